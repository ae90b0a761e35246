"""`torchtitan-lite config diff A B`: what differs between two recipes or finished runs. No torch."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchtitan_lite.config.difference import config_difference
from torchtitan_lite.config.loading import load_traced, user_path
from torchtitan_lite.errors import UserError
from torchtitan_lite.preflight import JobPlan, plan_job
from torchtitan_lite.strict_json import strict_dumps

Pairs = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Side:
    """One of the two. config: as asdict(JobConfig) in JSON. derived: what follows from it at `world_size`; nothing
    where that is None. filled: keys that were left open."""

    name: str
    config: dict[str, Any]
    derived: dict[str, str]
    filled: tuple[str, ...]
    world_size: int | None


def run(a: str, b: str, world_size: int | None, *, as_json: bool) -> int:
    """Print the difference; return the exit code. Raises UserError for what cannot be read.

    world_size: what recipes are resolved for; None: what the run beside them had, and not at all beside a recipe.
    """
    paths = user_path(a, "A"), user_path(b, "B")
    runs = [of_run(path) if _is_run(path) else None for path in paths]
    ranks = world_size or next((side.world_size for side in runs if side), None)
    left, right = (side or _of_recipe(path, ranks) for side, path in zip(runs, paths, strict=True))
    for side in runs:
        if side and world_size not in (None, side.world_size):
            print(f"{side.name}: a run on {side.world_size} ranks, shown as it was", file=sys.stderr)
    set_apart, derived = parted(left, right)
    if as_json:
        sizes = [left.world_size, right.world_size]
        document = {"a": a, "b": b, "world_size": sizes, "config": set_apart, "derived": derived}
        print(strict_dumps(document, indent=1))
    else:
        print("\n".join(lines(left, right, set_apart, derived)))
    return 0


def lines(left: Side, right: Side, config: dict[str, Pairs], derived: Pairs) -> list[str]:
    """The difference for a reader, a section after the other."""
    found = [f"a  {_headed(left)}", f"b  {_headed(right)}"]
    for title, pairs in [*((f"[{section}]", pairs) for section, pairs in config.items()), ("derived", derived)]:
        if pairs:
            width = max(map(len, pairs))
            found += ["", title, *(f"{key:<{width}}  {shown(x)} -> {shown(y)}" for key, (x, y) in pairs.items())]
    return found if len(found) > 2 else [*found, "", "no difference"]


def parted(left: Side, right: Side) -> tuple[dict[str, Pairs], Pairs]:
    """What differs in what was asked for, and in what followed on both sides."""
    config: dict[str, Pairs] = {}
    derived: Pairs = {}
    both = set(left.filled) & set(right.filled)
    for section, pairs in config_difference(left.config, right.config).items():
        for key, pair in pairs.items():
            if (name := f"{section}.{key}") in both:
                derived[name] = pair
            else:
                config.setdefault(section, {})[key] = pair
    if left.world_size and right.world_size:
        if left.world_size != right.world_size:
            derived["world_size"] = left.world_size, right.world_size
        names = dict.fromkeys([*left.derived, *right.derived])
        told = {name: (left.derived.get(name), right.derived.get(name)) for name in names}
        derived |= {name: pair for name, pair in told.items() if pair[0] != pair[1]}
    return config, derived


def _is_run(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".json"


def of_run(path: Path) -> Side:
    """The side of a run folder or its config.json. Raises UserError where there is none."""
    return recorded(path)[0]


def recorded(path: Path) -> tuple[Side, dict[str, Any]]:
    """As of_run, with all that the config.json holds."""
    file = path / "config.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        config, derived, ranks = dict(record["config"]), dict(record["derived"]), int(record["world_size"])
        return Side(str(path), config, derived, tuple(record.get("filled", ())), ranks), record
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; name a recipe, or the folder of a run that has started") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{file}: is not a config.json of ours; name a run folder or a recipe") from None


def of_plan(plan: JobPlan, name: str) -> Side:
    """The side of a recipe that is resolved for some ranks."""
    return Side(name, _plain(asdict(plan.config)), dict(plan.derived()), plan.filled, plan.dims.world_size)


def _of_recipe(path: Path, ranks: int | None) -> Side:
    if ranks is None:
        return Side(str(path), _plain(asdict(load_traced(path)[0])), {}, (), None)
    return of_plan(plan_job(path, (), ranks), str(path))


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """As config.json has it, where infinity is a string."""
    return dict(json.loads(strict_dumps(config)))


def _headed(side: Side) -> str:
    return f"{side.name}, {side.world_size} ranks" if side.world_size else side.name


def shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
