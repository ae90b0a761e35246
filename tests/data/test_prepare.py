"""A corpus is tokenised once, whole or not at all, and split by the names of its documents."""

import json
import logging
import multiprocessing
import os
import random
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from fcntl import LOCK_EX, flock
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchtitan_lite.config.schema import Data, Training
from torchtitan_lite.data import prepare as module
from torchtitan_lite.data import tokenizer as tokenizer_module
from torchtitan_lite.data.prepare import Source, Split, prepare
from torchtitan_lite.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from torchtitan_lite.errors import UserError

VOCAB = 300


def _texts(count: int) -> dict[str, str]:
    draw = random.Random(11)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(200)]
    return {
        f"book-{index:02d}.txt": f"{index}\t" + " ".join(draw.choices(words, k=120)) + "\r\n" for index in range(count)
    }


def _write(folder: Path, texts: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    return folder


@pytest.fixture
def texts() -> dict[str, str]:
    return _texts(24)


@pytest.fixture
def books(tmp_path: Path, texts: dict[str, str]) -> Path:
    return _write(tmp_path / "books", texts)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of VOCAB pieces, for tests that are about something else."""
    path = tmp_path_factory.mktemp("tokenizer") / "some.model"
    path.write_bytes(train_tokenizer(_texts(24).values(), VOCAB))
    return str(path)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _prepare(books: Path, cache: Path, model: str = "", fraction: float = 0.25, vocab_size: int = VOCAB) -> Source:
    training = Training(dataset="text", dataset_path=str(books))
    data = Data(cache_folder=str(cache), validation_fraction=fraction)
    return prepare(training, data, model, vocab_size).sources[0]


def _tokens(prepared: Source, split: Split) -> list[int]:
    dtype = np.dtype(prepared.dtype).newbyteorder("<")
    return [int(token) for name in split.files for token in np.fromfile(prepared.folder / name, dtype)]


def _documents(prepared: Source, split: Split) -> list[str]:
    """The texts between begin and end tokens."""
    tokenizer, documents = load_tokenizer(prepared.tokenizer_path), []
    ids: list[int] = []
    for token in _tokens(prepared, split):
        if token == tokenizer.bos_id:
            assert not ids
        elif token == tokenizer.eos_id:
            documents.append(tokenizer.decode(ids))
            ids = []
        else:
            ids.append(token)
    assert not ids, "text after the last end token"
    return documents


def _folders(cache: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in cache.iterdir() if path.is_dir())


def test_a_file_holds_begin_text_end_of_each_document_in_order(
    books: Path, cache: Path, model: str, texts: dict[str, str]
) -> None:
    prepared = _prepare(books, cache, model, fraction=0.0)
    tokenizer = load_tokenizer(model)
    expected = []
    for name in sorted(texts):
        expected += [tokenizer.bos_id, *tokenizer.encode(texts[name]), tokenizer.eos_id]
    assert prepared.dtype == "uint16"
    assert prepared.train == Split(("train-00000.bin",), len(expected), len(texts))
    assert prepared.validation == Split((), 0, 0)
    assert _tokens(prepared, prepared.train) == expected
    assert (prepared.folder / "train-00000.bin").stat().st_size == 2 * len(expected)
    assert prepared.tokenizer_path == Path(model)
    assert prepared.tokenizer_fingerprint == tokenizer.fingerprint
    assert (prepared.vocab_size, prepared.bos_id) == (VOCAB, tokenizer.bos_id)


def test_a_tokenizer_is_trained_where_none_is_named(books: Path, cache: Path, texts: dict[str, str]) -> None:
    prepared = _prepare(books, cache)
    assert prepared.tokenizer_path.is_relative_to(cache)
    assert prepared.vocab_size == VOCAB
    assert sorted(_documents(prepared, prepared.train) + _documents(prepared, prepared.validation)) == sorted(
        texts.values()
    )
    assert _folders(cache) == ["corpus", "tokenizer"]


def test_a_trained_vocabulary_has_a_largest_size(books: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def train(texts: Any, vocab_size: int) -> bytes:
        asked.append(vocab_size)
        raise UserError("seen")

    monkeypatch.setattr(tokenizer_module, "train_tokenizer", train)
    for vocab_size in (500, 32_768, 128_256):
        with pytest.raises(UserError, match="seen"):
            _prepare(books, cache, vocab_size=vocab_size)
    assert asked == [500, 32_768, 32_768]


def test_held_out_documents_are_chosen_by_a_hash_of_their_names(
    books: Path, cache: Path, model: str, texts: dict[str, str]
) -> None:
    prepared = _prepare(books, cache, model, fraction=0.25)
    held_out = [
        name
        for name in sorted(texts)
        if int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") / 2**64 < 0.25
    ]
    assert 0 < len(held_out) < len(texts)
    assert _documents(prepared, prepared.validation) == [texts[name] for name in held_out]
    assert _documents(prepared, prepared.train) == [texts[name] for name in sorted(texts) if name not in held_out]
    assert (prepared.train.documents, prepared.validation.documents) == (24 - len(held_out), len(held_out))


def test_a_document_stays_on_its_side_when_others_come_and_its_text_changes(
    books: Path, cache: Path, model: str, texts: dict[str, str]
) -> None:
    before = set(_documents(first := _prepare(books, cache, model), first.validation))
    assert before
    changed = {name: text + "more" for name, text in texts.items()}
    _write(books, changed | {f"new-{index}.txt": f"new {index}" for index in range(8)})
    second = _prepare(books, cache, model)
    after = {text for text in _documents(second, second.validation) if not text.startswith("new")}
    assert after == {text + "more" for text in before}


def test_a_larger_part_holds_out_the_smaller_one(books: Path, cache: Path, model: str) -> None:
    parts = []
    for fraction in (0.1, 0.25, 0.5):
        prepared = _prepare(books, cache, model, fraction)
        parts.append(set(_documents(prepared, prepared.validation)))
    assert parts[0] < parts[1] < parts[2]


def test_the_second_time_comes_from_the_cache(books: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _prepare(books, cache)
    made = [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(cache.rglob("*"))]

    def refuse(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(module, "_tokenise", refuse)
    monkeypatch.setattr(tokenizer_module, "train_tokenizer", refuse)
    assert _prepare(books, cache) == first
    assert [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(cache.rglob("*"))] == made


def test_a_changed_file_gives_another_folder_and_fingerprint(books: Path, cache: Path, model: str) -> None:
    first = _prepare(books, cache, model)
    with (books / "book-00.txt").open("a") as handle:
        handle.write("one more line\n")
    second = _prepare(books, cache, model)
    assert second.folder != first.folder
    assert second.fingerprint != first.fingerprint
    assert (first.folder / "prepared.json").exists()


@pytest.mark.parametrize("change", ["fraction", "tokenizer"])
def test_another_split_or_tokenizer_gives_another_folder(
    books: Path, cache: Path, model: str, change: str, texts: dict[str, str], tmp_path: Path
) -> None:
    first = _prepare(books, cache, model)
    if change == "fraction":
        second = _prepare(books, cache, model, fraction=0.5)
    else:
        larger = tmp_path / "larger.model"
        larger.write_bytes(train_tokenizer(texts.values(), VOCAB + 20))
        second = _prepare(books, cache, str(larger), vocab_size=VOCAB + 20)
    assert second.folder != first.folder
    assert second.fingerprint != first.fingerprint


def test_equal_texts_elsewhere_and_at_another_time_have_the_same_fingerprint(
    books: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    first = _prepare(books, tmp_path / "cache 1")
    elsewhere = _write(tmp_path / "else" / "where", texts)
    for path in elsewhere.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    second = _prepare(elsewhere, tmp_path / "cache 2")
    assert second.fingerprint == first.fingerprint
    assert second.tokenizer_fingerprint == first.tokenizer_fingerprint
    assert (second.train, second.validation) == (first.train, first.validation)


def test_the_name_of_a_tokenizer_file_does_not_count(books: Path, cache: Path, model: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.model"
    copy.write_bytes(Path(model).read_bytes())
    first, second = _prepare(books, cache, model), _prepare(books, cache, str(copy))
    assert (second.folder, second.fingerprint) == (first.folder, first.fingerprint)
    assert second.tokenizer_path == copy


def test_shards_split_between_documents(
    books: Path, cache: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _prepare(books, tmp_path / "other cache", model)
    monkeypatch.setattr(module, "_SHARD_TOKENS", 800)
    prepared = _prepare(books, cache, model)
    files = prepared.train.files
    assert len(files) > 2
    assert files == tuple(f"train-{index:05d}.bin" for index in range(len(files)))
    assert prepared.validation.files[0] == "validation-00000.bin"
    for name in files:
        shard = np.fromfile(prepared.folder / name, "<u2")
        assert (shard[0], shard[-1]) == (1, 2), "a shard begins and ends with a document"
        assert len(shard) >= 800 or name == files[-1]
    assert _tokens(prepared, prepared.train) == _tokens(whole, whole.train)
    assert _tokens(prepared, prepared.validation) == _tokens(whole, whole.validation)
    assert prepared.train.tokens == whole.train.tokens
    assert prepared.fingerprint == whole.fingerprint, "where files are cut is no part of the data"


def test_a_large_vocabulary_takes_four_bytes_a_token(
    books: Path, cache: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Large(Tokenizer):
        def __init__(self) -> None:
            self.vocab_size, self.bos_id, self.eos_id, self.fingerprint = 70_000, 1, 2, "large"

        def keeps_text(self) -> bool:
            return True

        def encode_all(self, texts: Any, threads: int) -> list[list[int]]:
            return [[69_999]] * len(texts)

    monkeypatch.setattr(tokenizer_module, "load_tokenizer", lambda _: Large())
    prepared = _prepare(books, cache, model, fraction=0.0, vocab_size=70_000)
    assert prepared.dtype == "uint32"
    assert _tokens(prepared, prepared.train) == [1, 69_999, 2] * 24


def test_a_vocabulary_larger_than_the_models_is_refused(books: Path, cache: Path, model: str) -> None:
    with pytest.raises(UserError) as raised:
        _prepare(books, cache, model, vocab_size=VOCAB - 1)
    assert str(raised.value) == (
        f'model.tokenizer_path = "{model}" has {VOCAB} pieces, the model a vocabulary of {VOCAB - 1}; '
        "choose a flavor that holds them or another tokenizer"
    )
    assert _prepare(books, cache, model, vocab_size=VOCAB + 1).vocab_size == VOCAB


def test_mistakes_in_the_corpus_or_the_tokenizer_are_named(
    books: Path, cache: Path, model: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.model").write_text("no model")
    for path, tokenizer, message in [
        (tmp_path / "nowhere", model, r'training\.dataset_path = ".*nowhere": no such file or folder'),
        (tmp_path / "empty", model, r'training\.dataset_path = ".*empty": no files in this folder'),
        (books, str(tmp_path / "x.model"), r'model\.tokenizer_path = ".*x\.model": cannot be read: No such file'),
        (books, str(tmp_path), r'model\.tokenizer_path = ".*": cannot be read: Is a directory'),
        (books, str(tmp_path / "no.model"), r'model\.tokenizer_path = ".*no\.model": is no sentencepiece model'),
    ]:
        with pytest.raises(UserError, match=f"^{message}"):
            _prepare(path, cache, tokenizer)
    assert _folders(cache) == []


@pytest.mark.parametrize("trained", [True, False])
def test_a_file_that_is_no_utf8_is_named_and_nothing_is_left(
    books: Path, cache: Path, model: str, trained: bool
) -> None:
    (books / "book-05.txt").write_bytes(b"abc \xff")
    with pytest.raises(UserError, match=r"training\.dataset_path: .*book-05\.txt is not UTF-8 at byte 4"):
        _prepare(books, cache, "" if trained else model)
    assert _folders(cache) == []


def test_a_crash_leaves_no_folder_and_the_next_start_makes_it(books: Path, cache: Path, model: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls: list[str] = []

        def fail(name: str, fraction: float) -> bool:
            calls.append(name)
            if len(calls) > 10:
                raise RuntimeError("power cut")
            return False

        patch.setattr(module, "_held_out", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            _prepare(books, cache, model)
    assert len(calls) == 11
    assert _folders(cache) == []
    assert _prepare(books, cache, model).train.documents > 0
    assert _folders(cache) == ["corpus"]


def test_a_failed_training_leaves_no_folder(books: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="the corpus gives no tokenizer of 30000 pieces"):
        _prepare(books, cache, vocab_size=30_000)
    assert _folders(cache) == []


def test_a_prepared_corpus_can_be_read_by_others(books: Path, cache: Path) -> None:
    prepared = _prepare(books, cache)
    for folder in (prepared.folder, prepared.tokenizer_path.parent):
        assert folder.stat().st_mode & 0o777 == 0o755


def test_what_is_published_says_what_it_is(books: Path, cache: Path, model: str) -> None:
    prepared = _prepare(books, cache, model)
    summary = json.loads((prepared.folder / "prepared.json").read_text())
    assert summary["vocab_size"] == VOCAB
    assert summary["fingerprint"] == prepared.fingerprint
    assert summary["train"] == {
        "files": list(prepared.train.files),
        "tokens": prepared.train.tokens,
        "documents": prepared.train.documents,
    }


_barrier: Any = None


def _join(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _prepare_at_once(books: Path, cache: Path) -> Source:
    _barrier.wait(timeout=60)
    return _prepare(books, cache)


def test_two_processes_at_once_make_one_cache(books: Path, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=_join, initargs=(context.Barrier(2),)) as pool:
        futures = [pool.submit(_prepare_at_once, books, cache) for _ in range(2)]
        first, second = (future.result(timeout=60) for future in futures)
    assert first == second == _prepare(books, cache)
    assert _folders(cache) == ["corpus", "tokenizer"]


def test_who_comes_second_waits_and_says_so(books: Path, cache: Path, model: str) -> None:
    first = _prepare(books, cache, model)
    first.folder.rename(first.folder.with_name("kept"))
    waiting = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == f"waiting for another process that prepares {first.folder.name}":
                waiting.set()

    listener, level = Listener(), module.logger.level
    module.logger.addHandler(listener)
    module.logger.setLevel(logging.INFO)
    try:
        with ThreadPoolExecutor(1) as pool:
            with (cache / f"{first.folder.name}.lock").open("w") as lock:
                flock(lock, LOCK_EX)
                second = pool.submit(_prepare, books, cache, model)
                assert waiting.wait(timeout=30)
                assert not second.done()
                (cache / "kept").rename(first.folder)
            assert second.result(timeout=30) == first
    finally:
        module.logger.removeHandler(listener)
        module.logger.setLevel(level)


def test_the_cache_folder_is_named_by_recipe_then_environment_then_home(
    books: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TORCHTITAN_LITE_CACHE", raising=False)
    training = Training(dataset="text", dataset_path=str(books))

    def folder(named: str = "") -> Path:
        return prepare(training, Data(cache_folder=named), model, VOCAB).sources[0].folder.parent

    assert folder() == tmp_path / "home" / ".cache" / "torchtitan_lite"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "torchtitan_lite"
    monkeypatch.setenv("TORCHTITAN_LITE_CACHE", str(tmp_path / "environment"))
    assert folder() == tmp_path / "environment"
    assert folder(str(tmp_path / "recipe")) == tmp_path / "recipe"
    assert folder("~/mine") == tmp_path / "home" / "mine"


def test_a_cache_folder_that_cannot_be_made_is_named(books: Path, model: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cache folder .*deep: Not a directory; set data\.cache_folder to one that"):
        _prepare(books, tmp_path / "file" / "deep", model)


def test_machines_with_other_cores_prepare_the_same_data(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = []
    for cores in (1, 3):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        prepared.append(_prepare(books, tmp_path / f"cache-{cores}"))
    assert prepared[0].tokenizer_fingerprint == prepared[1].tokenizer_fingerprint
    assert prepared[0].fingerprint == prepared[1].fingerprint


def test_a_mixture_trains_its_tokenizer_on_all_sources_and_tokenises_each(
    books: Path, cache: Path, tmp_path: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = _write(tmp_path / "more", {"a.txt": "another " * 50, "b.txt": "source " * 60})
    seen: list[str] = []

    def train(documents: Any, vocab_size: int) -> bytes:
        seen.extend(documents)
        return train_tokenizer(seen, vocab_size)

    monkeypatch.setattr(tokenizer_module, "train_tokenizer", train)
    data = Data(cache_folder=str(cache), mixture_paths=[str(books), str(more)], mixture_weights=[2, 5])
    mixed = prepare(Training(dataset="mixture"), data, "", VOCAB)
    assert seen == [texts[name] for name in sorted(texts)] + ["another " * 50, "source " * 60]
    assert mixed.weights == (2, 5)
    assert [source.setting for source in mixed.sources] == ["data.mixture_paths[0]", "data.mixture_paths[1]"]
    assert len({source.tokenizer_fingerprint for source in mixed.sources}) == 1
    assert _folders(cache) == ["corpus", "corpus", "tokenizer"]
    second = mixed.sources[1]
    assert sorted(_documents(second, second.train) + _documents(second, second.validation)) == sorted(seen[-2:])
    # Alone under that tokenizer it is the same cache.
    data = Data(cache_folder=str(cache))
    (alone,) = prepare(
        Training(dataset="text", dataset_path=str(more)), data, str(second.tokenizer_path), VOCAB
    ).sources
    assert alone.folder == second.folder
