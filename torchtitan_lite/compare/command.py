"""`torchtitan-lite compare A.toml B.toml ... --out DIR`: run what is to run, judge, report."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from torchtitan_lite.compare.conditions import parse, require_sides
from torchtitan_lite.compare.document import document, write
from torchtitan_lite.compare.launching import Interrupted, planned, run_all
from torchtitan_lite.compare.page import html
from torchtitan_lite.compare.sides import Side, Source, gather, side_name
from torchtitan_lite.compare.sweep import combinations
from torchtitan_lite.compare.words import table
from torchtitan_lite.config.loading import user_path
from torchtitan_lite.distributed.environment import accelerators, count_from
from torchtitan_lite.errors import UserError
from torchtitan_lite.preflight import identity
from torchtitan_lite.strict_json import strict_dumps

REPEATS = 5


@dataclass(frozen=True)
class Asked:
    """The command's options; None where it leaves one out."""

    sources: Sequence[str]
    out: str
    steps: int | None
    ranks: int | None
    repeats: int | None
    target_loss: float | None
    varied: Sequence[str]
    conditions: Sequence[str]
    as_json: bool


def run(asked: Asked) -> int:
    """Return the exit code: 0; 1 where a condition does not hold; 130 where the user stopped it. Raises UserError, also
    where nothing could be compared, with the report written."""
    conditions = [parse(text) for text in asked.conditions]
    sources = [Source(text) for text in asked.sources]
    if asked.varied:
        if len(sources) != 1 or not sources[0].is_recipe:
            raise UserError(f"--vary goes over one recipe, and there are {len(sources)} arguments; name one .toml file")
        sources = combinations(sources[0].text, asked.varied)
    if len(sources) < 2:
        raise UserError(
            f"{asked.sources[0]}: alone it is compared with nothing; name another recipe or run, or use --vary"
        )
    _require_effects(asked, sources)
    repeats = asked.repeats or REPEATS
    ranks = asked.ranks or count_from("NPROC", accelerators() or 2)
    told = sys.stderr
    sides, failed = gather(sources, ranks, asked.steps)
    for source, why in failed:
        print(f"{'refused' if asked.varied else 'failed'}: {source.name}, {source}: {why}", file=told)
    if len(sides) < 2:
        raise UserError(f"nothing is left to compare: {failed[0][1] if failed else 'name two'}")
    require_sides(conditions, [side_name(place) for place in range(len(sources))])
    out = user_path(asked.out, "--out")
    if not asked.out.strip():
        raise UserError("--out is empty; name a folder for runs and report")
    _make(out)
    interrupted = _run_recipes(sides, out, repeats, ranks, told)
    record = document(
        sides,
        [] if asked.varied else failed,
        failed if asked.varied else [],
        conditions,
        {
            "steps": asked.steps,
            "repeats": repeats if any(side.plan for side in sides) else None,
            "target_loss": asked.target_loss,
        },
    )
    write(out, record, html)
    shown = told if asked.as_json else sys.stdout
    print("\n".join(["", *table(record), "", str(record["words"])]), file=shown)
    if asked.as_json:
        print(strict_dumps(record, indent=1))
    print(f"\nall is in {out / 'report.html'}, and in {out / 'report.json'}", file=shown)
    if interrupted:
        print("stopped; finished runs stay, and the same command goes on with the rest", file=told)
        return 130
    if not record["pairs"]:
        raise UserError(f"nothing could be compared: {_first_lost(sides)}")
    return 0 if all(each["holds"] for each in record["assertions"]) else 1


def _require_effects(asked: Asked, sources: Sequence[Source]) -> None:
    """Raise UserError for options that say how recipes run, where there is none."""
    if any(source.is_recipe for source in sources):
        return
    options = {"--steps": asked.steps, "--nproc": asked.ranks, "--repeats": asked.repeats}
    for option, value in options.items():
        if value is not None:
            raise UserError(f"{option} {value}: nothing is run, all that is named has finished; leave it out")


def _first_lost(sides: Sequence[Side]) -> str:
    return next(f"{side.name} ({side.label}): {why}" for side in sides for _, why in side.lost)


def _run_recipes(sides: Sequence[Side], out: Path, repeats: int, ranks: int, told: TextIO) -> bool:
    """Whether the user stopped it."""
    from tqdm import tqdm

    steps = planned(sides, repeats)
    if not steps:
        return False
    _prepare(sides, told)
    given = " ".join(next(side.given for side in sides if side.plan))
    print(f"each run: {given}, on {ranks} ranks", file=told)
    with tqdm(total=steps, unit="step", file=told, disable=None, dynamic_ncols=True) as bar:
        done: dict[tuple[str, int], int] = {}

        def watch(side: Side, repeat: int, step: int) -> None:
            bar.set_postfix_str(f"{side.name} {side.label}, repeat {repeat + 1} of {repeats}", refresh=False)
            bar.update(step - done.get((side.name, repeat), 0))
            done[side.name, repeat] = step

        try:
            run_all(sides, out, repeats, ranks, watch)
        except Interrupted:
            return True
    return False


def _prepare(sides: Sequence[Side], told: TextIO) -> None:
    """The corpora, before anything is timed, and what each side is to train on."""
    from torchtitan_lite.data.prepare import prepare
    from torchtitan_lite.observability.logging import setup_logging

    setup_logging(told)
    for side in sides:
        if side.plan is not None:
            config = side.plan.config
            try:
                vocabulary = side.plan.model_args.vocab_size
                prepared = prepare(config.training, config.data, config.model.tokenizer_path, vocabulary)
                side.identity = identity(side.plan, prepared)
            except UserError as error:
                side.lost.append((Path(side.source.text), str(error)))


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}; choose another") from None
