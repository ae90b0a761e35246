"""Initial weights: by name and seed alone, any rows alone, the distribution that was asked for."""

import torch

from torchtitan_lite.models.common import initialize as module
from torchtitan_lite.models.common.initialize import initial_rows
from torchtitan_lite.models.spec import Init

SHAPE = torch.Size((1000, 300))


NORMAL = Init(std=0.02)


def _rows(start: int, stop: int, name: str = "layers.0.w", seed: int = 42, init: Init = NORMAL) -> torch.Tensor:
    return initial_rows(name, SHAPE, seed, init, start, stop)


def test_any_rows_alone_are_those_of_the_whole() -> None:
    whole = _rows(0, 1000)
    assert whole.shape == SHAPE
    for start, stop in ((0, 1), (0, 250), (250, 500), (333, 334), (999, 1000), (500, 1000)):
        assert torch.equal(_rows(start, stop), whole[start:stop])


def test_rows_across_blocks_are_those_of_the_whole() -> None:
    shape = torch.Size((3 * module._BLOCK // 1024, 1024))
    per_block = module._BLOCK // 1024
    whole = initial_rows("w", shape, 1, Init(std=1.0), 0, shape[0])
    for start, stop in ((per_block - 3, 2 * per_block + 5), (per_block + 2, per_block + 9), (2 * per_block, shape[0])):
        assert torch.equal(initial_rows("w", shape, 1, Init(std=1.0), start, stop), whole[start:stop])
    # Blocks draw from generators of their own.
    assert not torch.equal(whole[:per_block], whole[per_block : 2 * per_block])


def test_name_and_seed_decide() -> None:
    assert torch.equal(_rows(0, 10), _rows(0, 10))
    assert not torch.equal(_rows(0, 10), _rows(0, 10, name="layers.1.w"))
    assert not torch.equal(_rows(0, 10), _rows(0, 10, seed=43))


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    _rows(0, 1000)
    assert torch.equal(torch.get_rng_state(), before)


def test_distributions() -> None:
    normal = _rows(0, 1000, init=Init(std=0.5, mean=2.0))
    assert abs(normal.mean() - 2.0) < 0.005
    assert abs(normal.std() - 0.5) < 0.005
    cut = _rows(0, 1000, init=Init(std=0.5, cutoff=1.0))
    assert cut.abs().max() <= 0.5
    assert cut.abs().max() > 0.49
    assert torch.equal(_rows(0, 3, init=Init(mean=1.0)), torch.ones(3, 300))


def test_golden_values() -> None:
    # A change of these changes every model that is trained anew: raise the version, say so in the changelog.
    values = initial_rows("tok_embeddings.weight", torch.Size((4, 4)), 42, Init(std=1.0), 0, 1)[0]
    assert torch.allclose(values, torch.tensor(GOLDEN), atol=1e-6)


GOLDEN = [0.8601040840, -0.1885352582, 1.607274055, -0.4328755438]


def test_threads_that_draw_together_change_no_bit() -> None:
    shape, threads = torch.Size((3000, 1024)), torch.get_num_threads()
    try:
        for init in (Init(std=0.02), Init(std=0.02, cutoff=3.0)):
            drawn = []
            for count in (1, 3):
                torch.set_num_threads(count)
                drawn.append(initial_rows("w", shape, 1, init, 5, 2999))
            assert torch.equal(*drawn)
    finally:
        torch.set_num_threads(threads)
