"""Where documents come from. A document is the text of one file."""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from torchtitan_lite.config.loading import user_path
from torchtitan_lite.config.schema import Data, Training
from torchtitan_lite.errors import UserError

_SKIPPED_IN_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Files below `root`, sorted by name; `signature` changes when a file's name, size or time does.

    setting: the key of the recipe that names it, for messages.
    """

    setting: str
    root: Path
    names: tuple[str, ...]
    signature: str

    def documents(self) -> Iterator[tuple[str, str]]:
        """(name, text) of each file, line ends as they are. Raises UserError for a file that is not readable UTF-8."""
        for name in self.names:
            path = self.root / name
            try:
                yield name, path.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self.setting}: {path} is not UTF-8 at byte {error.start}; convert it or move it away"
                ) from None
            except OSError as error:
                raise UserError(f"{self.setting}: {path} cannot be read: {error.strerror}") from None


def find_corpora(training: Training, data: Data) -> list[Corpus]:
    """The files of each source that a recipe names, one source unless the dataset is a mixture.

    Raises UserError where there are none to read, or where a mixture holds the same files twice.
    """
    if training.dataset == "python_stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        names = _walk(root, _SKIPPED_IN_STDLIB, ".py", "training.dataset")
        where = f'training.dataset = "python_stdlib": no source files under {root}'
        return [_corpus("training.dataset", root, names, where)]
    if training.dataset == "text":
        return [_text("training.dataset_path", training.dataset_path)]
    corpora: dict[Path, Corpus] = {}
    for index, path in enumerate(data.mixture_paths):
        setting = f"data.mixture_paths[{index}]"
        corpus = _text(setting, path)
        place = user_path(path, setting).resolve()
        if place in corpora:
            raise UserError(
                f'{setting} = "{path}" is {corpora[place].setting} again; keep one, with the weights of both'
            )
        corpora[place] = corpus
    return list(corpora.values())


def _text(setting: str, path: str) -> Corpus:
    root, where = user_path(path, setting), f'{setting} = "{path}"'
    if not root.exists():
        raise UserError(f"{where}: no such file or folder")
    names = [root.name] if root.is_file() else _walk(root, set(), "", setting)
    return _corpus(setting, root.parent if root.is_file() else root, names, f"{where}: no files in this folder")


def _corpus(setting: str, root: Path, names: list[str], where: str) -> Corpus:
    if not names:
        raise UserError(f"{where}; name a folder with UTF-8 text")
    return Corpus(setting, root, tuple(names), _signature(root, names, where, setting))


def _walk(root: Path, skipped: set[str], suffix: str, setting: str) -> list[str]:
    """Names relative to `root` of all files with `suffix`, hidden ones left out, sorted."""
    names: list[str] = []

    def refuse(error: OSError) -> None:
        raise UserError(f"{setting}: {error.filename} cannot be read: {error.strerror}")

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        prefix = os.path.relpath(folder, root)
        names += [
            name if prefix == "." else f"{prefix}/{name}".replace(os.sep, "/")
            for name in files
            if name.endswith(suffix) and not name.startswith(".")
        ]
    return sorted(names)


def _signature(root: Path, names: list[str], where: str, setting: str) -> str:
    digest = sha256()
    size = 0
    for name in names:
        try:
            stat = os.stat(root / name)
        except OSError as error:
            raise UserError(f"{setting}: {root / name} cannot be read: {error.strerror}") from None
        size += stat.st_size
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    if size == 0:
        raise UserError(f"{where.partition(': no files')[0]}: all files are empty; name a folder with UTF-8 text")
    return digest.hexdigest()
