"""A hang in plain words: who waits, in what, and who did not arrive. No torch."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

# What a rank "has been" for so long; a phase that is not here reads well as it is.
_HAS_BEEN = {
    "forward and backward": "in forward and backward",
    "optimizer step": "in the optimizer step",
    "agreeing": "agreeing with the others",
    "validation": "in validation",
    "logging": "putting together what is logged",
}
LOADING = "loading data"
# Names in one report: of a thousand ranks that did not arrive, the first ones say enough.
_NAMED = 4


@dataclass(frozen=True)
class Account:
    """What a rank says of itself, or what it said last.

    seconds: since it last came forward. answered: whether it still answers; if not, seconds since it was heard of, -1
    if it never was. where: its innermost line of the project's code. collective: what that line waits in; "" where it
    waits in none.
    """

    rank: int
    host: str
    step: int
    phase: str
    seconds: float
    answered: bool = True
    where: str = ""
    collective: str = ""


@dataclass(frozen=True)
class Limit:
    """The setting whose time has passed, and its seconds."""

    key: str
    seconds: int


def report(accounts: Sequence[Account], limit: Limit, stacks: str, alone: bool = False) -> str:
    """One line on a hang. accounts: one of each rank. alone: the job's store did not answer, so there is one only."""
    ordered = sorted(accounts, key=lambda account: account.rank)
    answered = [account for account in ordered if account.answered]
    step, seconds = min(a.step for a in answered), max(a.seconds for a in answered)
    what = f"step {step}" if step else "the start of the run"
    head = f"{what} has hung for {seconds:.0f} s ({limit.key} = {limit.seconds})"
    single = len(ordered) == 1
    lost_store = " The job's store did not answer, so this is the account of one rank." if alone else ""
    body = _alone(ordered[0]) if single else _together(ordered, step)
    return f"error: {head}. {body}{lost_store} Stacks: {stacks}"


def _alone(account: Account) -> str:
    waits = f", waiting in {account.collective}" if account.collective else ""
    return f"Rank {account.rank} has been {_doing(account)} for {account.seconds:.0f} s{waits} ({_place(account)})."


def _together(accounts: Sequence[Account], step: int) -> str:
    waiting = [account for account in accounts if account.answered and account.collective]
    busy = [account for account in accounts if account.answered and not account.collective]
    silent = [account for account in accounts if not account.answered]
    groups: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for account in waiting:
        groups[account.collective, account.where, account.step].append(account.rank)
    if not busy and not silent:
        return _all_arrived(groups, step)
    said = [*_waits(groups, step), *_named([_busy(account) for account in busy])]
    said += _named([_silent(account) for account in silent])
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}. {_verdict(busy, silent)}"


def _all_arrived(groups: dict[tuple[str, str, int], list[int]], step: int) -> str:
    if len(groups) == 1:
        ((collective, where, _),) = groups
        return (
            f"All ranks wait in {collective} ({where}), none is missing: it is the network, or a collective that never "
            "ends."
        )
    return f"No rank is missing, but they are in different collectives: {'; '.join(_waits(groups, step))}."


def _waits(groups: dict[tuple[str, str, int], list[int]], step: int) -> list[str]:
    return [
        f"{_ranks(ranks)} {'wait' if len(ranks) > 1 else 'waits'} in {collective} ({where})"
        + (f" of step {at}" if at != step else "")
        for (collective, where, at), ranks in groups.items()
    ]


def _busy(account: Account) -> str:
    return (
        f"rank {account.rank} did not arrive: it has been {_doing(account)} for {account.seconds:.0f} s "
        f"({_place(account)})"
    )


def _silent(account: Account) -> str:
    if account.seconds < 0:
        return f"rank {account.rank} did not arrive: nothing was ever heard of it"
    return (
        f"rank {account.rank} did not arrive: nothing was heard of it for {account.seconds:.0f} s, last in "
        f'"{account.phase}" of step {account.step} (host {account.host})'
    )


def _verdict(busy: Sequence[Account], silent: Sequence[Account]) -> str:
    """Whose fault it is not."""
    if silent:
        return "A process that is silent is stopped or lost, or cut off from the job's store."
    if all(account.phase == LOADING for account in busy):
        return "This is a stall of the data loader, not of communication."
    return "This is not a stall of communication: look at what these ranks do."


def _doing(account: Account) -> str:
    return _HAS_BEEN.get(account.phase, account.phase)


def _place(account: Account) -> str:
    return f"{account.where}, host {account.host}" if account.where else f"host {account.host}"


def _named(lines: Sequence[str]) -> list[str]:
    more = len(lines) - _NAMED
    return [*lines[:_NAMED], f"nor did {more} more"] if more > 0 else list(lines)


def _ranks(ranks: Iterable[int]) -> str:
    """`rank 2`, `ranks 0, 1, 3`, `ranks 0 to 6, 8`."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(ranks)), lambda pair: pair[1] - pair[0])]
    parts = [part for run in runs for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(n) for n in run])]
    many = len(parts) > 1 or len(runs[0]) > 1
    return f"{'ranks' if many else 'rank'} {', '.join(parts)}"
