"""What a log line says, and what is not said twice."""

import io
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest

from torchtitan_lite.observability.logging import at_step, log_repeated, setup_logging

TIME = r"\d\d:\d\d:\d\d"

logger = logging.getLogger("torchtitan_lite.trainer")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger("torchtitan_lite")
    before = (root.handlers[:], root.propagate, root.level, warnings.showwarning)
    yield
    root.handlers[:], root.propagate, level, warnings.showwarning = before
    root.setLevel(level)


def test_each_line_says_which_rank_at_which_step() -> None:
    out = io.StringIO()
    setup_logging(out, rank=3)
    logger.info("mesh")
    at_step(7, 100)
    logger.info("a table\nof two lines")
    logger.warning("careful")
    logger.error("broken")
    patterns = (
        "rank 3  mesh",
        "rank 3 step   7/100  a table",
        "rank 3 step   7/100  of two lines",
        "rank 3 step   7/100  warning: careful",
        "rank 3 step   7/100  error: broken",
    )
    for line, pattern in zip(out.getvalue().splitlines(), patterns, strict=True):
        assert re.fullmatch(f"{TIME} {pattern}", line)


def test_a_launcher_is_no_rank_and_a_new_start_at_no_step() -> None:
    out = io.StringIO()
    at_step(7, 100)
    setup_logging(out)
    logger.info("waiting")
    assert re.fullmatch(f"{TIME}  waiting\n", out.getvalue())


def test_a_warning_is_shown_once_and_counted() -> None:
    out = io.StringIO()
    setup_logging(out)
    for number in (1, 1, 2, 1):
        logger.warning("skipped %d", number)
        logger.error("failed")
    log_repeated()
    told = [line.partition("  ")[2] for line in out.getvalue().splitlines()]
    assert told.count("warning: skipped 1") == told.count("warning: skipped 2") == 1
    assert told.count("error: failed") == 4
    assert told[-1] == "2 times more: skipped 1"


def test_the_same_warning_of_several_ranks_is_shown_once() -> None:
    program = (
        "import logging, sys, torchtitan_lite.observability.logging as log; rank = int(sys.argv[1]);"
        "log.setup_logging(shown=rank == 0, rank=rank); logger = logging.getLogger('torchtitan_lite');"
        "logger.info('hello'); logger.warning('of all'); logger.warning('of %d', rank); sys.stdin.read()"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for rank in range(3)
    ]
    heard = []
    for process in ranks:
        assert process.stdout is not None
        heard.append(process.stdout.readline())  # they are all there
    for process in ranks:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        heard.append(process.stdout.read())
        process.wait(timeout=30)
    text = "".join(heard)
    told = sorted(line.partition("  ")[2] for line in text.splitlines())
    assert told == ["hello", "warning: of 0", "warning: of 1", "warning: of 2", "warning: of all"]
    assert "rank 2  warning: of 2" in text


def test_warnings_of_libraries_are_a_line_of_the_log() -> None:
    out = io.StringIO()
    setup_logging(out)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning("changes\n  soon", FutureWarning, "/x/site-packages/torch/nn.py", 12)
    assert out.getvalue().endswith("  warning: changes soon (FutureWarning, torch/nn.py, line 12)\n")


def test_only_what_says_nothing_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    setup_logging(io.StringIO())
    torchao = logging.getLogger("torchao")
    torchao.warning("Failed to load /x/torchao/_C_mxfp8.so: Could not load this library")
    torchao.warning("Something else")
    logging.getLogger("torch.utils._pytree").warning("%s is an Enum subclass and is now natively supported by", int)
    assert [record.getMessage() for record in caplog.records] == ["Something else"]


@pytest.mark.parametrize(
    ("stream", "variables", "coloured"),
    [
        (_Terminal(), {}, True),
        (_Terminal(), {"NO_COLOR": "1"}, False),
        (_Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_colours_are_for_terminals(
    stream: io.StringIO, variables: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"NO_COLOR": "", "TERM": "xterm"} | variables).items():
        monkeypatch.setitem(os.environ, name, value)
    setup_logging(stream)
    logger.warning("careful")
    assert ("\x1b[33mwarning: careful\x1b[0m\n" in stream.getvalue()) == coloured
    assert ("\x1b" in stream.getvalue()) == coloured
