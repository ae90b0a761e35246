"""What is compared: recipes that are to run, and runs that have."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from string import ascii_uppercase

import torchtitan_lite
from torchtitan_lite.compare.runs import Run, read_run
from torchtitan_lite.config.difference import config_difference
from torchtitan_lite.config.loading import user_path
from torchtitan_lite.errors import UserError
from torchtitan_lite.preflight import JobPlan, plan_job
from torchtitan_lite.recipe_diff import Side as Described
from torchtitan_lite.recipe_diff import of_plan
from torchtitan_lite.run_record import commit

# Keys that are a run's own, and tell nothing of its recipe.
OWN = ("job.dump_folder", "job.description", "debug.seed")


@dataclass(frozen=True)
class Source:
    """What the user named. overrides: of a recipe, as on the command line. label: a short name."""

    text: str
    overrides: tuple[str, ...] = ()
    label: str = ""

    @property
    def is_recipe(self) -> bool:
        return self.text.endswith(".toml")

    def __str__(self) -> str:
        return " ".join((self.text, *self.overrides))


@dataclass
class Side:
    """One of those compared. plan: of its recipe; None for runs that were there. lost: (folder, what became of it) of
    runs that say nothing."""

    name: str
    label: str
    source: Source
    plan: JobPlan | None
    described: Described
    runs: list[Run] = field(default_factory=list)
    lost: list[tuple[Path, str]] = field(default_factory=list)


def gather(sources: Sequence[Source], ranks: int, steps: int | None) -> tuple[list[Side], list[tuple[Source, str]]]:
    """The sides that can be compared, by name A, B, ..., and those that cannot, each with the reason."""
    sides: list[Side] = []
    failed: list[tuple[Source, str]] = []
    for source in sources:
        name = _name(len(sides))
        try:
            sides.append(_of_recipe(name, source, ranks, steps) if source.is_recipe else _of_runs(name, source))
        except UserError as error:
            failed.append((source, str(error)))
    log_freq = min((side.plan.config.metrics.log_freq for side in sides if side.plan), default=1)
    for side in sides:
        if side.plan:
            side.plan = plan_job(side.source.text, _overrides(side.source, side.plan, steps, log_freq), ranks)
    return sides, failed


def key_of(plan: JobPlan, seed: int) -> str:
    """What a finished run must have been of to be kept: config, ranks, seed and code."""
    config = of_plan(plan, "").config
    for own in OWN:
        section, _, name = own.partition(".")
        config[section].pop(name)
    told = [config, plan.dims.world_size, seed, torchtitan_lite.__version__, commit()]
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def overrides_of(side: Side, steps: int | None) -> list[str]:
    """Of the side's recipe, those of the comparison among them, but for folder and seed."""
    assert side.plan is not None
    return _overrides(side.source, side.plan, steps, side.plan.config.metrics.log_freq)


def _overrides(source: Source, plan: JobPlan, steps: int | None, log_freq: int) -> list[str]:
    """Checkpoints would be neither's doing, and curves need points."""
    last = steps or plan.config.training.steps
    of_comparison = [f"--metrics.log_freq={max(1, min(log_freq, last // 50))}", "--checkpoint.enable=false"]
    return [*source.overrides, *([f"--training.steps={steps}"] if steps else []), *of_comparison]


def _of_recipe(name: str, source: Source, ranks: int, steps: int | None) -> Side:
    given = [*source.overrides, *([f"--training.steps={steps}"] if steps else [])]
    plan = plan_job(source.text, given, ranks)
    label = source.label or Path(source.text).stem
    return Side(name, label, source, plan, of_plan(plan, str(source)))


def _of_runs(name: str, source: Source) -> Side:
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
    return Side(name, source.label or folder.resolve().name, source, None, runs[0].described, runs, lost)


def _require_repeats(folder: Path, runs: Sequence[Run]) -> None:
    for run in runs[1:]:
        differing = config_difference(runs[0].described.config, run.described.config)
        keys = [f"{section}.{key}" for section, pairs in differing.items() for key in pairs]
        if others := [key for key in keys if key not in OWN]:
            raise UserError(
                f"{folder}: {runs[0].folder.name} and {run.folder.name} differ in {', '.join(others[:3])}, so they "
                "are no repeats of one recipe; name the run folders one by one"
            )


def _name(index: int) -> str:
    """A, B, ... Z, AA, ..."""
    return ("" if index < 26 else _name(index // 26 - 1)) + ascii_uppercase[index % 26]
