"""Which files are a corpus, under which names, and what changes its signature."""

import os
import sysconfig
from pathlib import Path

import pytest

from torchtitan_lite.config.schema import Data, Training
from torchtitan_lite.data.sources import Corpus, find_corpora
from torchtitan_lite.errors import UserError


def _find(path: Path | str) -> Corpus:
    (corpus,) = find_corpora(Training(dataset="text", dataset_path=str(path)), Data())
    return corpus


def _write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


@pytest.fixture
def books(tmp_path: Path) -> Path:
    return _write(tmp_path / "books", {"b.txt": "two\r\nlines", "a/z.md": "Zoë\t", "a.txt": "one\n", "empty": ""})


def test_a_folder_is_a_document_per_file_sorted_by_name(books: Path) -> None:
    corpus = _find(books)
    assert corpus.root == books
    assert corpus.names == ("a.txt", "a/z.md", "b.txt", "empty")
    # Line ends, tabs and accents come as they are in the files.
    assert list(corpus.documents()) == [
        ("a.txt", "one\n"),
        ("a/z.md", "Zoë\t"),
        ("b.txt", "two\r\nlines"),
        ("empty", ""),
    ]


def test_a_file_is_a_corpus_of_one_document(books: Path) -> None:
    corpus = _find(books / "a" / "z.md")
    assert list(corpus.documents()) == [("z.md", "Zoë\t")]


def test_hidden_files_and_folders_are_left_out(books: Path) -> None:
    before = _find(books)
    _write(books, {".hidden": "x", ".git/config": "x", "a/.swp": "x"})
    assert _find(books) == before


def test_the_home_folder_may_be_written_with_a_tilde(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(books.parent))
    assert _find("~/books").names == _find(books).names


def test_the_signature_does_not_depend_on_where_the_corpus_lies(books: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    signature = _find(books).signature
    books.rename(moved)
    assert _find(moved).signature == signature


@pytest.mark.parametrize("change", ["name", "size", "time", "one more", "one less"])
def test_the_signature_changes_with_any_file(books: Path, change: str) -> None:
    before = _find(books).signature
    file = books / "a.txt"
    stat = file.stat()
    if change == "name":
        file.rename(books / "c.txt")
    elif change == "size":
        file.write_text("one more\n")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "time":
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "one more":
        _write(books, {"c.txt": ""})
    else:
        file.unlink()
    assert _find(books).signature != before


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    with pytest.raises(UserError) as raised:
        _find(path)
    assert str(raised.value).startswith(f'training.dataset_path = "{path}": no such file or folder')


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(UserError) as raised:
        _find(tmp_path)
    assert str(raised.value) == (
        f'training.dataset_path = "{tmp_path}": no files in this folder; name a folder with UTF-8 text'
    )


def test_a_folder_of_empty_files_is_named(tmp_path: Path) -> None:
    _write(tmp_path, {"a": "", "b": ""})
    with pytest.raises(UserError) as raised:
        _find(tmp_path)
    assert str(raised.value) == (
        f'training.dataset_path = "{tmp_path}": all files are empty; name a folder with UTF-8 text'
    )


def test_a_file_that_is_no_utf8_is_named_with_the_byte(books: Path) -> None:
    (books / "b.txt").write_bytes(b"caf\xe9 latin-1")
    documents = _find(books).documents()
    assert next(documents)[0] == "a.txt"
    assert next(documents)[0] == "a/z.md"
    with pytest.raises(UserError) as raised:
        next(documents)
    assert str(raised.value) == (
        f"training.dataset_path: {books / 'b.txt'} is not UTF-8 at byte 3; convert it or move it away"
    )


def test_a_file_that_went_away_is_named(books: Path) -> None:
    corpus = _find(books)
    (books / "a.txt").unlink()
    with pytest.raises(UserError, match=r"training\.dataset_path: .*a\.txt cannot be read: No such file"):
        list(corpus.documents())


def test_the_standard_library_is_its_source_files_without_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(
        tmp_path,
        {
            "os.py": "import abc\n",
            "json/decoder.py": "NaN = float('nan')\n",
            "lib.so": "binary",
            "LICENSE.txt": "words",
            "test/test_os.py": "x",
            "idlelib/idle_test/test_x.py": "x",
            "site-packages/numpy.py": "x",
            "dist-packages/y.py": "x",
            "json/__pycache__/decoder.py": "x",
        },
    )
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    (corpus,) = find_corpora(Training(), Data())
    assert corpus.names == ("json/decoder.py", "os.py")


def test_this_python_has_a_standard_library() -> None:
    (corpus,) = find_corpora(Training(), Data())
    names = corpus.names
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    assert not any("/test/" in f"/{name}" or "site-packages" in name for name in names)


def test_a_standard_library_without_sources_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match=r'training\.dataset = "python_stdlib": no source files under '):
        find_corpora(Training(), Data())


def _mixed(*paths: Path | str) -> list[Corpus]:
    return find_corpora(Training(dataset="mixture"), Data(mixture_paths=[str(path) for path in paths]))


def test_a_mixture_has_a_corpus_for_each_path(books: Path, tmp_path: Path) -> None:
    _write(tmp_path / "more", {"one.txt": "1"})
    first, second = _mixed(books, tmp_path / "more" / "one.txt")
    alone = _find(books)
    assert (first.names, first.signature) == (alone.names, alone.signature)
    assert list(second.documents()) == [("one.txt", "1")]


def test_a_source_of_a_mixture_is_named_by_its_place(books: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'^data\.mixture_paths\[1\] = ".*nowhere": no such file or folder'):
        _mixed(books, tmp_path / "nowhere")
    _write(tmp_path / "more", {"one.txt": ""})
    with pytest.raises(UserError, match=r'^data\.mixture_paths\[1\] = ".*more": all files are empty'):
        _mixed(books, tmp_path / "more")
    (tmp_path / "more" / "one.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"^data\.mixture_paths\[1\]: .*one\.txt is not UTF-8 at byte 3"):
        list(_mixed(books, tmp_path / "more")[1].documents())


def test_a_mixture_takes_no_path_twice(books: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(books)
    for again in (books, f"{books}/", f"{books}/../{books.name}", tmp_path / "link"):
        with pytest.raises(UserError) as raised:
            _mixed(books, again)
        assert str(raised.value) == (
            f'data.mixture_paths[1] = "{again}" is data.mixture_paths[0] again; keep one, with the weights of both'
        )
