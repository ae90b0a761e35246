"""What is compared: recipes that are to run, and runs that have."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from torchtitan_lite.compare.runs import Run, read_run
from torchtitan_lite.config.difference import config_difference
from torchtitan_lite.config.loading import user_path
from torchtitan_lite.errors import UserError
from torchtitan_lite.preflight import JobPlan, plan_job
from torchtitan_lite.recipe_diff import Side as Described
from torchtitan_lite.recipe_diff import of_plan
from torchtitan_lite.run_record import commit, versions

# Keys that are a run's own, and tell nothing of its recipe.
OWN = ("job.dump_folder", "job.description", "debug.seed")
_OWN_IDENTITY = ("debug.seed", "checkpoint.folder")


@dataclass(frozen=True)
class Source:
    """What the user named. overrides: of a recipe, as on the command line. label: a short name. name: its letter."""

    text: str
    overrides: tuple[str, ...] = ()
    label: str = ""
    name: str = ""

    @property
    def is_recipe(self) -> bool:
        return self.text.endswith(".toml")

    def __str__(self) -> str:
        return " ".join((self.text, *self.overrides))


@dataclass
class Side:
    """One of those compared. plan: of its recipe, as it is run; None for runs that were there. given: what the
    comparison gives its runs beside their recipe. identity: of what it is to train on. lost: (folder, what became of
    it) of runs that say nothing."""

    name: str
    label: str
    source: Source
    plan: JobPlan | None
    described: Described
    given: tuple[str, ...] = ()
    identity: Mapping[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    lost: list[tuple[Path, str]] = field(default_factory=list)


def gather(sources: Sequence[Source], ranks: int, steps: int | None) -> tuple[list[Side], list[tuple[Source, str]]]:
    """The sides that can be compared, and the sources that cannot, each with the reason. Letters go by place, A for the
    first source: one that cannot be compared passes its letter to no other."""
    sides: list[Side] = []
    failed: list[tuple[Source, str]] = []
    for place, unnamed in enumerate(sources):
        source = replace(unnamed, name=side_name(place))
        try:
            sides.append(_of_recipe(source, ranks, steps) if source.is_recipe else _of_runs(source))
        except UserError as error:
            failed.append((source, str(error)))
    given = _given(sides, steps)
    for side in sides:
        if side.plan:
            side.given = given
            side.plan = plan_job(side.source.text, overrides_of(side), ranks)
            side.described = of_plan(side.plan, str(side.source))
    return sides, failed


def key_of(plan: JobPlan, seed: int, identity: Mapping[str, Any]) -> str:
    """What a finished run must have been of to be kept: config, ranks, seed, data, code, and the libraries under it.

    identity: as preflight.identity tells.
    """
    config = of_plan(plan, "").config
    for own in OWN:
        section, _, name = own.partition(".")
        config[section].pop(name)
    told = [config, plan.dims.world_size, seed, _without(identity, _OWN_IDENTITY), versions(), commit()]
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def overrides_of(side: Side) -> list[str]:
    """Of the side's recipe, those of the comparison among them, but for folder and seed."""
    return [*side.source.overrides, *side.given]


def side_name(place: int) -> str:
    """A, B, ... Z, AA, ..."""
    return ("" if place < 26 else side_name(place // 26 - 1)) + ascii_uppercase[place % 26]


def _given(sides: Sequence[Side], steps: int | None) -> tuple[str, ...]:
    """The same for all recipes. Curves need points. Saving is nobody's doing, unless it is what sides differ in, or
    what a finished run beside them did."""
    configs = [side.plan.config for side in sides if side.plan]
    if not configs:
        return ()
    log_freq = min(max(1, min(each.metrics.log_freq, each.training.steps // 50)) for each in configs)
    alike = all(each.checkpoint == configs[0].checkpoint for each in configs)
    saved = any(run.described.config["checkpoint"]["enable"] for side in sides for run in side.runs)
    given = [f"--training.steps={steps}"] if steps else []
    given.append(f"--metrics.log_freq={log_freq}")
    return tuple(given) if saved or not alike else (*given, "--checkpoint.enable=false")


def _of_recipe(source: Source, ranks: int, steps: int | None) -> Side:
    given = [*source.overrides, *([f"--training.steps={steps}"] if steps else [])]
    plan = plan_job(source.text, given, ranks)
    return Side(source.name, source.label or Path(source.text).stem, source, plan, of_plan(plan, str(source)))


def _of_runs(source: Source) -> Side:
    """A run folder; or a folder of some, which are repeats of one recipe."""
    folder = user_path(source.text, "a run to compare")
    runs: list[Run] = []
    lost: list[tuple[Path, str]] = []
    inside = sorted(each.parent for each in folder.glob("*/config.json")) if folder.is_dir() else []
    if (folder / "config.json").exists() or not inside:
        runs.append(read_run(folder))
    else:
        for each in inside:
            try:
                runs.append(read_run(each))
            except UserError as error:
                lost.append((each, str(error)))
        if not runs:
            raise UserError(f"{folder}: no run in it has logged a step: {lost[0][1]}")
        _require_repeats(folder, runs)
    label = source.label or folder.resolve().name
    return Side(source.name, label, source, None, runs[0].described, runs=runs, lost=lost)


def _require_repeats(folder: Path, runs: Sequence[Run]) -> None:
    for run in runs[1:]:
        differing = config_difference(runs[0].described.config, run.described.config)
        keys = [f"{section}.{key}" for section, pairs in differing.items() for key in pairs]
        first, other = _circumstances(runs[0]), _circumstances(run)
        keys += [name for name in dict.fromkeys([*first, *other]) if first.get(name) != other.get(name)]
        if others := [key for key in keys if key not in OWN]:
            raise UserError(
                f"{folder}: {runs[0].folder.name} and {run.folder.name} differ in {', '.join(others[:3])}, so they "
                "are no repeats of one recipe; name the run folders one by one"
            )


def _circumstances(run: Run) -> dict[str, Any]:
    """What a run was made of and ran on, beside its config."""
    libraries = {f"version of {name}": version for name, version in run.versions.items()}
    return {"ranks": run.ranks, "device": run.device, **_without(run.identity, _OWN_IDENTITY), **libraries}


def _without(table: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name not in names}
