"""Tokenise a corpus once, into memory-mapped shards that every later run shares.

What makes a cache imports what it needs; what finds one there imports next to nothing.

Layout of a prepared corpus: `prepared.json` and `train-00000.bin`, `validation-00000.bin`, ... of raw
little-endian tokens, documents in the order of their names, each between a begin and an end token.
"""

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b, sha256
from itertools import islice
from pathlib import Path
from typing import Any

from torchtitan_lite.config.loading import user_path
from torchtitan_lite.config.schema import Data, Training
from torchtitan_lite.data.sources import Corpus, find_corpora
from torchtitan_lite.errors import UserError

_FORMAT = 2  # raise it when what preparation writes changes; caches of another format are left alone
_SHARD_TOKENS = 1 << 28
_BATCH = 64  # documents tokenised in one call
LARGEST_TRAINED_VOCABULARY = 32_768

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """The token shards of one part of the corpus, in order, with their tokens and documents in all."""

    files: tuple[str, ...]
    tokens: int
    documents: int

    def samples(self, seq_len: int) -> int:
        """Samples of seq_len + 1 tokens, each sharing its last token with the next."""
        return max(0, (self.tokens - 1) // seq_len)


@dataclass(frozen=True)
class Source:
    """A tokenised corpus on disk.

    setting: the key of the recipe that names it. fingerprint: of all tokens and the tokenizer; equal fingerprints are
    equal data. dtype: numpy name of the tokens' type. bos_id: the token that every document begins with.
    """

    setting: str
    folder: Path
    tokenizer_path: Path
    tokenizer_fingerprint: str
    vocab_size: int
    bos_id: int
    fingerprint: str
    dtype: str
    train: Split
    validation: Split


@dataclass(frozen=True)
class Prepared:
    """What a run reads: one source, or a mixture of several under one tokenizer.

    weights: samples of each source in a window of the order (see mixture); (1,) for one source.
    """

    sources: tuple[Source, ...]
    weights: tuple[int, ...] = (1,)

    @property
    def tokenizer_path(self) -> Path:
        return self.sources[0].tokenizer_path

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.sources[0].tokenizer_fingerprint

    @property
    def fingerprint(self) -> str:
        """Of the sources in their order; of one source it is that source's."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        return sha256("\0".join(source.fingerprint for source in self.sources).encode()).hexdigest()

    def tokens(self) -> tuple[int, int]:
        """Training and held-out tokens, of all sources together."""
        return sum(s.train.tokens for s in self.sources), sum(s.validation.tokens for s in self.sources)


def prepare(training: Training, data: Data, tokenizer_path: str, vocab_size: int) -> Prepared:
    """Find the corpora, train or load the tokenizer, tokenise; each at most once, then read from the cache.

    vocab_size: the model's; a trained tokenizer has as many pieces, up to LARGEST_TRAINED_VOCABULARY. A mixture's is
    trained on all documents of its sources. Each source has a cache of its own, whatever it is mixed with.
    Processes that want the same cache at once wait for the one that makes it. Raises UserError.
    """
    cache = _cache_folder(data)
    corpora = find_corpora(training, data)
    if tokenizer_path:
        model = user_path(tokenizer_path, "model.tokenizer_path")
    else:
        model = _trained_tokenizer(cache, corpora, min(vocab_size, LARGEST_TRAINED_VOCABULARY))
    try:
        model_bytes = model.read_bytes()
    except OSError as error:
        raise UserError(f'model.tokenizer_path = "{model}": cannot be read: {error.strerror}') from None
    fingerprint = sha256(model_bytes).hexdigest()
    sources = []
    for corpus in corpora:
        key = _key("corpus", corpus.signature, fingerprint, str(data.validation_fraction))
        make = partial(_tokenise, corpus=corpus, model=model, validation_fraction=data.validation_fraction)
        source = _read(_published(cache, f"corpus-{key}", "prepared.json", make), corpus.setting, model)
        if source.vocab_size > vocab_size:
            raise UserError(
                f'model.tokenizer_path = "{model}" has {source.vocab_size} pieces, the model a vocabulary of '
                f"{vocab_size}; choose a flavor that holds them or another tokenizer"
            )
        sources.append(source)
    return Prepared(tuple(sources), tuple(data.mixture_weights) or (1,))


def require_samples(prepared: Prepared, seq_len: int, validating: bool) -> None:
    """Raise UserError where a part of a source that the run needs does not hold one sample."""
    for source in prepared.sources:
        train, held_out = source.train, source.validation
        mixed = len(prepared.sources) > 1
        if not train.samples(seq_len):
            mend = "use more text or a shorter seq_len"
            if not train.documents:  # a source of one file, as it happens
                mend = "all its documents are held out: set data.validation_fraction = 0 or split them into more"
            raise UserError(
                f"training.seq_len = {seq_len}: the training part of {source.setting if mixed else 'the corpus'} has "
                f"{train.tokens} tokens and a sample needs {seq_len + 1}; {mend}"
            )
        if validating and not held_out.samples(seq_len):
            raise UserError(
                f"validation.enable = true: the held-out part{f' of {source.setting}' if mixed else ''} has "
                f"{held_out.documents} documents with {held_out.tokens} tokens and a sample needs {seq_len + 1}; raise "
                "data.validation_fraction or use more text"
            )


def _cache_folder(data: Data) -> Path:
    named = data.cache_folder or os.environ.get("TORCHTITAN_LITE_CACHE", "")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = user_path(named, "cache folder") if named else Path(base) / "torchtitan_lite"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        raise UserError(
            f"cache folder {folder}: {error.strerror}; set data.cache_folder to one that can be written"
        ) from None
    return folder


def _key(*parts: str) -> str:
    return blake2b("\0".join((str(_FORMAT), *parts)).encode(), digest_size=8).hexdigest()


def _trained_tokenizer(cache: Path, corpora: list[Corpus], vocab_size: int) -> Path:
    def make(folder: Path) -> None:
        from torchtitan_lite.data.tokenizer import train_tokenizer

        documents = sum(len(corpus.names) for corpus in corpora)
        logger.info("training a tokenizer of %d pieces on %d documents", vocab_size, documents)
        model = train_tokenizer((text for corpus in corpora for _, text in corpus.documents()), vocab_size)
        (folder / "tokenizer.model").write_bytes(model)

    key = _key(*(corpus.signature for corpus in corpora), str(vocab_size))
    folder = _published(cache, f"tokenizer-{key}", "tokenizer.model", make)
    return folder / "tokenizer.model"


def _published(cache: Path, name: str, member: str, make: Callable[[Path], None]) -> Path:
    """The folder `cache/name`, made by `make` in a temporary one and renamed when it is whole."""
    final = cache / name
    if (final / member).exists():
        return final
    with _lock(cache / f"{name}.lock"):
        if not (final / member).exists():
            for left_over in cache.glob(f"{name}.*/"):  # of a process that was killed: it held this lock
                shutil.rmtree(left_over)
            shutil.rmtree(final, ignore_errors=True)  # without its member it is no cache
            temporary = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=cache))
            try:
                make(temporary)
                temporary.chmod(0o755)
                temporary.rename(final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return final


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an advisory lock; it goes with the process, so a killed holder blocks nobody."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that prepares %s", path.stem)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _tokenise(folder: Path, corpus: Corpus, model: Path, validation_fraction: float) -> None:
    from tqdm import tqdm

    from torchtitan_lite.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    if not tokenizer.keeps_text():
        logger.warning("%s changes white space or characters: what it decodes is not the text to the letter", model)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    logger.info("tokenising %d documents", len(corpus.names))
    writers = {split: _ShardWriter(folder, split, dtype) for split in ("train", "validation")}
    documents = iter(tqdm(corpus.documents(), total=len(corpus.names), unit="document", disable=None, leave=False))
    while batch := list(islice(documents, _BATCH)):
        encoded = tokenizer.encode_all([text for _, text in batch], threads=os.cpu_count() or 1)
        for (name, _), ids in zip(batch, encoded, strict=True):
            split = "validation" if _held_out(name, validation_fraction) else "train"
            writers[split].add([tokenizer.bos_id, *ids, tokenizer.eos_id])
    splits = {split: writer.close() for split, writer in writers.items()}
    fingerprint = sha256(tokenizer.fingerprint.encode())
    for writer in writers.values():
        fingerprint.update(writer.digest.digest())
    summary = {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "fingerprint": fingerprint.hexdigest(),
        "dtype": dtype,
        **{split: asdict(part) for split, part in splits.items()},
    }
    logger.info(
        "prepared %d training tokens and %d held out, in %s",
        splits["train"].tokens,
        splits["validation"].tokens,
        folder.parent,
    )
    (folder / "prepared.json").write_text(json.dumps(summary, indent=1))


def _held_out(name: str, fraction: float) -> bool:
    """By a hash of the name: a document stays on its side when others come or go."""
    return (
        int.from_bytes(blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
        < fraction * 2**64
    )


class _ShardWriter:
    """Appends documents to `split-00000.bin` and starts a new file after _SHARD_TOKENS tokens."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        import numpy as np

        self._folder, self._split = folder, split
        self._pack = partial(np.asarray, dtype=np.dtype(dtype).newbyteorder("<"))
        self._files: list[str] = []
        self._tokens = self._documents = 0
        self._room = 0
        self._handle: Any = None
        self.digest = sha256()

    def add(self, ids: list[int]) -> None:
        if self._room <= 0:
            self._next_file()
        raw = self._pack(ids).tobytes()
        self._handle.write(raw)
        self.digest.update(raw)
        self._tokens += len(ids)
        self._documents += 1
        self._room -= len(ids)

    def close(self) -> Split:
        if self._handle is not None:
            self._handle.close()
        return Split(tuple(self._files), self._tokens, self._documents)

    def _next_file(self) -> None:
        if self._handle is not None:
            self._handle.close()
        self._files.append(f"{self._split}-{len(self._files):05d}.bin")
        self._handle = (self._folder / self._files[-1]).open("wb")
        self._room = _SHARD_TOKENS


def _read(folder: Path, setting: str, tokenizer_path: Path) -> Source:
    summary = json.loads((folder / "prepared.json").read_text())
    for name in ("train", "validation"):
        part = summary[name]
        summary[name] = Split(tuple(part["files"]), part["tokens"], part["documents"])
    return Source(setting=setting, folder=folder, tokenizer_path=tokenizer_path, **summary)
