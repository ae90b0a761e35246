"""Fixtures of all tests: the pool of ranks, a small corpus, a cache of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.corpus import write_corpus
from tests.ranks import RankPool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--max-ranks", type=int, default=4, help="rank processes at most; tests that need more are skipped"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = max((mark.args[0] for mark in item.iter_markers("ranks")), default=0)
    if needed > item.config.getoption("--max-ranks"):
        pytest.skip(f"needs {needed} ranks: run with --max-ranks={needed}")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU, there is none")


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    pool = RankPool(request.config.getoption("--max-ranks"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small text files, the same on every machine."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that the session's runs share."""
    return tmp_path_factory.mktemp("cache")
