"""The global order of samples: a seeded permutation of every epoch, computed per index.

Nothing is materialised and nothing rescanned: position p of the run is (epoch, index) = divmod(p, samples)
and its sample is permute(index), a pure function of (seed, epoch, samples).
"""

from hashlib import blake2b

_ROUNDS = 4


def sample_at(position: int, samples: int, seed: int | str) -> int:
    """Id of the sample at `position` (0, 1, ... over all epochs) of a corpus of `samples` samples."""
    epoch, index = divmod(position, samples)
    return permute(index, samples, f"{seed}/{epoch}")


def permute(index: int, size: int, key: str) -> int:
    """The image of `index` under a permutation of range(size) that `key` chooses.

    A Feistel network (Luby and Rackoff, 1988) permutes the next power of four; walking its cycle until the
    value falls below `size` restricts it, in fewer than four steps on average.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    value = _feistel(index, half_bits, key)
    while value >= size:
        value = _feistel(value, half_bits, key)
    return value


def _feistel(value: int, half_bits: int, key: str) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for turn in range(_ROUNDS):
        digest = blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
        left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
    return left << half_bits | right
