"""Log lines: when, which rank, at which step; each warning once; those of libraries that say something to a user."""

import logging
import os
import socket
import sys
import warnings
from collections import Counter
from hashlib import sha256
from typing import TextIO

from torchtitan_lite.errors import UserError
from torchtitan_lite.observability.terminal import colours_on, painted

# By logger: how lines begin or what they hold that tell a user nothing. Whatever else a library says is shown.
_IDLE_WORDS = {
    # Of kernels that need another CUDA, Python or card. The float8 used here is torch's own products, and a machine
    # without them is told so.
    "torchao": "Failed to load ",
    # torchao's to mend, not its users'.
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
}
_HAS_LINES = "Traceback of forward call"  # in the warning of autograd's anomaly mode
_COLOURS = {logging.WARNING: "warning", logging.ERROR: "bad"}


def shown_ranks(world_size: int) -> list[int]:
    """The ranks named in LOG_RANK, as in 0,3; rank 0 by default. Raises UserError for one that is not there."""
    text = os.environ.get("LOG_RANK") or "0"
    ranks = text.split(",")
    if not all(rank.isdecimal() and int(rank) < world_size for rank in ranks):
        raise UserError(f"LOG_RANK={text}: expected ranks below {world_size} separated by commas, as in 0,3")
    return [int(rank) for rank in ranks]


def setup_logging(stream: TextIO | None = None, shown: bool = True, rank: int | None = None) -> None:
    """Send this package's log to `stream` (stdout by default), and Python's warnings with it.

    shown: everything; else errors, and warnings that no other rank of this machine has had. rank: named in each line;
    None for a process that is no rank.
    """
    stream = stream or sys.stdout
    handler = logging.StreamHandler(stream)
    _LINES.begin(rank, colours_on(stream))
    handler.setFormatter(_LINES)
    handler.addFilter(_Once(others=rank is not None))
    root = logging.getLogger("torchtitan_lite")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(logging.INFO if shown else logging.WARNING)
    warnings.showwarning = _log_warning
    for name, words in _IDLE_WORDS.items():
        logging.getLogger(name).filters[:] = [_Without(words)]


def at_step(step: int, last: int) -> None:
    """Lines from now on are of this step, those of threads that work beside it too."""
    _LINES.step = f" step {step:>{len(str(last))}}/{last}"


def without_colours() -> None:
    """For the rest of this process."""
    _LINES.colours = False


def log_repeated() -> None:
    """Say how often the warnings that were shown once have come again."""
    for handler in logging.getLogger("torchtitan_lite").handlers:
        for once in handler.filters:
            if isinstance(once, _Once):
                once.tell()


class _Lines(logging.Formatter):
    """`TIME rank R step N/LAST  TEXT`, each line of a text."""

    def __init__(self) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self.begin(None, colours=False)

    def begin(self, rank: int | None, colours: bool) -> None:
        self.rank, self.step, self.colours = "" if rank is None else f" rank {rank}", "", colours

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record, self.datefmt)}{self.rank}{self.step}  "
        label = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        colour = _COLOURS.get(record.levelno, "") if self.colours else ""
        head = painted(head, "dim") if self.colours else head
        return "\n".join(head + painted(text, colour) for text in f"{label}{super().format(record)}".splitlines())


_LINES = _Lines()  # what a process's lines have in common, set by its one training loop


class _Without(logging.Filter):
    """Lets through what does not hold some words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self._words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self._words not in record.getMessage()


class _Once(logging.Filter):
    """Lets a warning through the first time that its text comes up, in this process and, with `others`, in those beside
    it that the same launcher started."""

    def __init__(self, others: bool) -> None:
        super().__init__()
        self._others, self._seen = others, Counter[str]()
        self._claims: list[socket.socket] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        text = record.getMessage()
        self._seen[text] += 1
        return self._seen[text] == 1 and (not self._others or self._first(text))

    def tell(self) -> None:
        for text, count in self._seen.items():
            if count > 1:
                logging.getLogger("torchtitan_lite").info("%d times more: %s", count - 1, text)
        self._seen.clear()

    def _first(self, text: str) -> bool:
        """A name that one process at a time may have, without a file that one that is killed would leave behind."""
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0torchtitan_lite/{os.getppid()}/{sha256(text.encode()).hexdigest()}")
        except OSError:
            claim.close()
            return False
        self._claims.append(claim)
        return True


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    where = filename.rpartition("/site-packages/")[2]
    text = str(message).rstrip()
    if _HAS_LINES not in text:
        text = " ".join(text.split())
    logging.getLogger("torchtitan_lite").warning("%s (%s, %s, line %d)", text, category.__name__, where, lineno)
