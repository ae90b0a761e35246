"""`torchtitan-lite COMMAND`, the same as `python -m torchtitan_lite COMMAND`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from torchtitan_lite.config import JobConfig, load_config
from torchtitan_lite.config.loading import leaf_names, load_traced, split_override
from torchtitan_lite.errors import UserError
from torchtitan_lite.strict_json import strict_dumps

logger = logging.getLogger("torchtitan_lite")

_CHECKPOINT_ACTIONS = {
    "list": "list checkpoints, left-overs, and what was set aside",
    "verify": "read checkpoints whole and compare checksums; exit 1 where one is bad",
    "inspect": "print what a checkpoint is of, and its tensors; of several, the newest",
}


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0 success, 2 the user's mistake."""
    try:
        options, rest = _parser().parse_known_args(arguments)
        for argument in rest:
            split_override(argument)
        if rest and not options.takes_overrides:
            raise UserError(f"argument {rest[0]}: this command takes no overrides")
        code = int(options.run(options, rest))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        print(error.line(), file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        return 141


def _parser() -> _Parser:
    parser = _Parser("torchtitan-lite", description="PyTorch-native LLM pre-training.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    _command(commands, "train", _train, "check a recipe, prepare its data, train it with torchrun on this machine")
    status = _command(
        commands, "status", _status, "show how runs are doing, from their folders; Ctrl-C ends it", "none"
    )
    status.add_argument("runs", nargs="+", metavar="RUN", help="run folders; several make a table")
    status.add_argument("--once", action="store_true", help="print it once, as where the output is no terminal")
    status.add_argument("--json", action="store_true", help="one JSON document on stdout, once")
    trace = _command(commands, "trace", _trace, "put the phases of a run's ranks into one Chrome trace", "none")
    trace.add_argument("run_folder", metavar="RUN", help="a run folder, of a run with profiling.phases = true")
    trace.add_argument("--out", metavar="FILE", help="where to write it; phases/trace.json in the run folder")
    trace.add_argument("--json", action="store_true", help="one JSON document on stdout")
    compare = _command(
        commands, "compare", _compare, "run recipes in turns and say what differs, and by how much", "none"
    )
    _compare_arguments(compare)
    _command(commands, "prepare", _prepare, "train the tokenizer and tokenise the corpus of a recipe, once")
    meet = _command(
        commands, "rendezvous", _rendezvous, "serve the store that launchers of several nodes meet at", "none"
    )
    meet.add_argument("--port", type=int, default=29400, help="TCP port, 29400 by default")
    meet.add_argument("--host", default="0.0.0.0", help="address to listen at, all by default")
    _checkpoint_commands(commands)
    _config_commands(commands)
    return parser


def _command(parent: Any, name: str, run: Any, help: str, recipes: str = "one") -> _Parser:
    sub: _Parser = parent.add_parser(name, help=help, description=help, allow_abbrev=False)
    sub.set_defaults(run=run, takes_overrides=recipes == "one")
    if recipes == "one":
        sub.add_argument("recipe", help="a TOML file")
        sub.epilog = "Overrides follow as --section.key=value."
    elif recipes == "many":
        sub.add_argument("recipes", nargs="+", metavar="RECIPE", help="TOML files")
    return sub


def _compare_arguments(compare: _Parser) -> None:
    compare.add_argument("sources", nargs="+", metavar="RECIPE_OR_RUN", help="TOML files, and folders of runs")
    compare.add_argument("--out", default="outputs/compare", metavar="DIR", help="for runs and report; outputs/compare")
    compare.add_argument("--steps", type=_positive, help="of each run; default: as its recipe says")
    compare.add_argument("--nproc", type=_positive, help="ranks; default: as run_train.sh")
    compare.add_argument("--repeats", type=_positive, default=5, help="runs of each recipe, with seeds in a row; 5")
    compare.add_argument("--target-loss", type=float, metavar="X", help="also say what it takes to reach this loss")
    compare.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="compare values of a key of one recipe; repeatable",
    )
    compare.add_argument(
        "--assert",
        dest="conditions",
        action="append",
        default=[],
        metavar="CONDITION",
        help='exit 1 where it fails, as in "B.loss ≈ A.loss" or "B.tps >= 0.95 * A.tps"; repeatable',
    )
    compare.add_argument("--json", action="store_true", help="report.json on stdout too, the table on stderr")


def _checkpoint_commands(commands: Any) -> None:
    checkpoint = commands.add_parser("checkpoint", help="list, verify and inspect checkpoints", allow_abbrev=False)
    actions = checkpoint.add_subparsers(required=True, metavar="ACTION", parser_class=_Parser)
    for action, told in _CHECKPOINT_ACTIONS.items():
        sub = _command(actions, action, _checkpoint, told, recipes="none")
        sub.add_argument("path", metavar="PATH", help="a checkpoint, a folder of some, or a run folder")
        sub.add_argument("--json", action="store_true", help="one JSON document on stdout")
        sub.set_defaults(action=action)


def _config_commands(commands: Any) -> None:
    config = commands.add_parser("config", help="show, check and document recipes", allow_abbrev=False)
    actions = config.add_subparsers(required=True, metavar="ACTION", parser_class=_Parser)
    show = _command(actions, "show", _show, "print a recipe with everything filled in")
    show.add_argument("--world-size", type=_positive, help="also resolve it for that many ranks")
    show.add_argument("--json", action="store_true", help="one JSON document on stdout")
    check = _command(actions, "check", _check, "check recipes without running them", recipes="many")
    check.add_argument("--world-size", type=_positive, help="ranks; default: the fewest that the degrees ask for")
    check.add_argument("--json", action="store_true", help="one JSON document on stdout")
    migrate = _command(actions, "migrate", _migrate, "turn a recipe of TorchTitan 0.2.x into one of ours", "none")
    migrate.add_argument("old", metavar="OLD", help="its TOML file")
    migrate.add_argument("--out", metavar="NEW", help="a file for the new recipe; without it, it goes to stdout")
    migrate.add_argument("--json", action="store_true", help="one JSON document on stdout")
    diff = _command(actions, "diff", _diff, "what differs between two recipes or finished runs", "none")
    diff.add_argument("a", metavar="A", help="a TOML file, a run folder or its config.json")
    diff.add_argument("b", metavar="B", help="another")
    diff.add_argument("--world-size", type=_positive, help="resolve recipes for so many ranks; default: those of a run")
    diff.add_argument("--json", action="store_true", help="one JSON document on stdout")
    _command(actions, "docs", _docs, "print docs/configuration.md", recipes="none")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return int(text)


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    from torchtitan_lite import launch

    return launch.main([options.recipe, *overrides])


def _prepare(options: argparse.Namespace, overrides: list[str]) -> int:
    from torchtitan_lite.data.prepare import prepare
    from torchtitan_lite.models.registry import find_model
    from torchtitan_lite.observability.logging import setup_logging

    setup_logging(sys.stderr)
    config = load_config(options.recipe, overrides)
    _, args = find_model(config.model)
    prepared = prepare(config.training, config.data, config.model.tokenizer_path, args.vocab_size)
    for source in prepared.sources:
        print(f"{source.folder}: {source.train.tokens:,} training tokens, {source.validation.tokens:,} held out")
    return 0


def _status(options: argparse.Namespace, _: list[str]) -> int:
    from torchtitan_lite import status

    return status.run(options.runs, as_json=options.json, once=options.once)


def _trace(options: argparse.Namespace, _: list[str]) -> int:
    from torchtitan_lite.profiling import merge

    return merge.run(options.run_folder, options.out, as_json=options.json)


def _compare(options: argparse.Namespace, _: list[str]) -> int:
    from torchtitan_lite.compare.command import Asked, run

    return run(
        Asked(
            options.sources,
            options.out,
            options.steps,
            options.nproc,
            options.repeats,
            options.target_loss,
            options.vary,
            options.conditions,
            options.json,
        )
    )


def _rendezvous(options: argparse.Namespace, _: list[str]) -> int:
    from torchtitan_lite.elastic.rendezvous import serve

    return serve(options.host, options.port)


def _checkpoint(options: argparse.Namespace, _: list[str]) -> int:
    from torchtitan_lite.checkpoint import report

    return report.run(options.action, options.path, as_json=options.json)


def _show(options: argparse.Namespace, overrides: list[str]) -> int:
    from torchtitan_lite.config.document import config_lines
    from torchtitan_lite.preflight import plan_job

    derived: dict[str, str] = {}
    warnings: list[str] = []
    config, origin = load_traced(options.recipe, overrides)
    if options.world_size:
        plan = plan_job(options.recipe, overrides, options.world_size)
        config, derived, warnings = plan.config, dict(plan.derived()), plan.warnings()
    if options.json:
        shown = {"config": asdict(config), "derived": derived, "warnings": warnings}
        sources = {key: origin.sources.get(key, "default") for key in leaf_names(JobConfig)}
        print(strict_dumps({**shown, "chain": origin.chain, "sources": sources}, indent=1))
        return 0
    if len(origin.chain) > 1:
        print(f"# {origin}\n")
    print("\n".join(config_lines(config)))
    for what, value in derived.items():
        print(f"\n# {what}: {value}" if what == next(iter(derived)) else f"# {what}: {value}")
    for warning in warnings:
        print(f"# warning: {warning}")
    return 0


def _check(options: argparse.Namespace, _: list[str]) -> int:
    rows = [_checked(recipe, options.world_size) for recipe in options.recipes]
    if options.json:
        print(strict_dumps(rows, indent=1))
    else:
        width = max(len(row["recipe"]) for row in rows)
        for row in rows:
            told = "; ".join(row["derived"].values()) if row["ok"] else f"error: {row['error']}"
            print(f"{row['recipe']:<{width}}  {'ok  ' if row['ok'] else 'FAIL'}  {told}")
    return 0 if all(row["ok"] for row in rows) else 2


def _checked(recipe: str, world_size: int | None) -> dict[str, Any]:
    from torchtitan_lite.preflight import plan_job, plan_smallest

    try:
        plan = plan_job(recipe, (), world_size) if world_size else plan_smallest(recipe)
    except UserError as error:
        return {"recipe": recipe, "ok": False, "world_size": world_size, "error": str(error)}
    return {"recipe": recipe, "ok": True, "world_size": plan.dims.world_size, "derived": dict(plan.derived())}


def _migrate(options: argparse.Namespace, _: list[str]) -> int:
    from torchtitan_lite import migrate

    return migrate.run(options.old, options.out, as_json=options.json)


def _diff(options: argparse.Namespace, _: list[str]) -> int:
    from torchtitan_lite import recipe_diff

    return recipe_diff.run(options.a, options.b, options.world_size, as_json=options.json)


def _docs(_: argparse.Namespace, __: list[str]) -> int:
    from torchtitan_lite.config.document import markdown

    print(markdown(), end="")
    return 0
