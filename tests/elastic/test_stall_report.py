"""The words for a hang, case by case."""

import re
from dataclasses import replace

import pytest

from torchtitan_lite.elastic.stall_report import Account, Limit, report

LIMIT = Limit("comm.train_timeout_seconds", 100)
NORM = Account(0, "h0", 12, "clipping gradients", 100.2, True, "clip, gradients.py:40", "all_reduce")
GATHER = replace(NORM, where="forward, decoder.py:39", collective="all_gather")
LOADER = Account(0, "h1", 12, "loading data", 103.4, True, "next_step, loader.py:88")
SLOW = replace(LOADER, phase="forward and backward", where="forward, model.py:7")
SILENT = Account(0, "h2", 12, "optimizer step", 98.0, answered=False)
NEVER = Account(0, "", 0, "", -1.0, answered=False)

HEAD = "error: step 12 has hung for 103 s (comm.train_timeout_seconds = 100). "
SHORTER = HEAD.replace("103", "100")
TAIL = " Stacks: run/comm_traces/step-12/"
NETWORK = "it is the network, or a collective that never ends."

CASES = {
    "one rank loads": (
        [NORM, NORM, LOADER, NORM],
        f"{HEAD}Ranks 0, 1, 3 wait in all_reduce (clip, gradients.py:40); rank 2 did not arrive: it has been loading "
        "data for 103 s (next_step, loader.py:88, host h1). This is a stall of the data loader, not of communication.",
    ),
    "one rank computes": (
        [NORM, SLOW],
        f"{HEAD}Rank 0 waits in all_reduce (clip, gradients.py:40); rank 1 did not arrive: it has been in forward and "
        "backward for 103 s (forward, model.py:7, host h1). This is not a stall of communication: look at what these "
        "ranks do.",
    ),
    "one rank is silent": (
        [NORM, SILENT],
        f"{SHORTER}Rank 0 waits in all_reduce (clip, gradients.py:40); rank 1 did not arrive: nothing was heard of it "
        'for 98 s, last in "optimizer step" of step 12 (host h2). A process that is silent is stopped or lost, or cut '
        "off from the job's store.",
    ),
    "one rank was never heard of": (
        [NORM, NEVER],
        f"{SHORTER}Rank 0 waits in all_reduce (clip, gradients.py:40); rank 1 did not arrive: nothing was ever heard "
        "of it. A process that is silent is stopped or lost, or cut off from the job's store.",
    ),
    "all wait in the same": (
        [NORM, NORM, NORM],
        f"{SHORTER}All ranks wait in all_reduce (clip, gradients.py:40), none is missing: {NETWORK}",
    ),
    "in different ones": (
        [NORM, NORM, NORM, GATHER],
        f"{SHORTER}No rank is missing, but they are in different collectives: ranks 0 to 2 wait in all_reduce (clip, "
        "gradients.py:40); rank 3 waits in all_gather (forward, decoder.py:39).",
    ),
    "in the same, a step apart": (
        [NORM, replace(NORM, step=13)],
        f"{SHORTER}No rank is missing, but they are in different collectives: rank 0 waits in all_reduce (clip, "
        "gradients.py:40); rank 1 waits in all_reduce (clip, gradients.py:40) of step 13.",
    ),
    "all load": (
        [LOADER, LOADER],
        f"{HEAD}Rank 0 did not arrive: it has been loading data for 103 s (next_step, loader.py:88, host h1); rank 1 "
        "did not arrive: it has been loading data for 103 s (next_step, loader.py:88, host h1). This is a stall of the "
        "data loader, not of communication.",
    ),
    "a single process": (
        [LOADER],
        f"{HEAD}Rank 0 has been loading data for 103 s (next_step, loader.py:88, host h1).",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hang_in_words(case: str) -> None:
    accounts, line = CASES[case]
    numbered = [replace(account, rank=rank) for rank, account in enumerate(accounts)]
    assert report(numbered[::-1], LIMIT, "run/comm_traces/step-12/") == line + TAIL


def test_a_rank_that_the_store_keeps_from_the_others_says_so() -> None:
    line = report([replace(NORM, rank=5)], LIMIT, "run/comm_traces/step-12/", alone=True)
    assert (
        "Rank 5 has been clipping gradients for 100 s, waiting in all_reduce (clip, gradients.py:40, host h0)." in line
    )
    assert "The job's store did not answer, so this is the account of one rank." in line


def test_a_thousand_ranks_make_one_short_line() -> None:
    accounts = [replace(NORM if rank < 900 else SILENT, rank=rank) for rank in range(1000)]
    line = report(accounts, LIMIT, "run/comm_traces/step-12/")
    assert "Ranks 0 to 899 wait in all_reduce" in line
    assert re.findall(r"rank (\d+) did not arrive", line) == ["900", "901", "902", "903"]
    assert "; nor did 96 more. " in line
    assert len(line) < 1000


def test_a_hang_before_the_first_step() -> None:
    accounts = [replace(NORM, step=0, rank=rank) for rank in range(2)]
    line = report(accounts, Limit("comm.init_timeout_seconds", 300), "run/comm_traces/step-0/")
    assert line.startswith("error: the start of the run has hung for 100 s (comm.init_timeout_seconds = 300). ")
