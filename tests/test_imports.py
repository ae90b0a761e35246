"""Layers: an import goes down or stays level, and what a launcher imports is light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchtitan_lite

PACKAGE = Path(torchtitan_lite.__file__).parent
HEAVY = ("torch", "tensorboard", "sentencepiece", "numpy", "transformers", "tqdm")

# From low to high, by the first name below the package; "" is the package's own __init__.
LAYERS = (
    {"errors", "fields", "files", "strict_json", ""},
    {"config"},
    {"distributed", "observability"},
    {"data", "models", "optim", "quantization", "checkpoint", "elastic", "profiling"},
    {"assembly", "balance", "mesh_rules", "model_table", "preflight", "rates", "run_record", "staged", "trainable"}
    | {"run_board"},
    {"trainer", "planner"},
    {"train"},
    {"launch", "compare", "growth", "migrate", "recipe_diff", "status", "status_text"},
    {"cli", "__main__"},
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _imports(module: str, source: str) -> Iterator[str]:
    """The package's modules that `source` imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            base = node.module or ""
            # `from package import name`: a module of that name, or else something within `package`.
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
        yield from (name for name in names if name.split(".")[0] == "torchtitan_lite")


def _layer(module: str) -> int:
    return LAYER_OF[f"{module}.".split(".")[1]]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_stands_in_a_layer(module: str) -> None:
    assert f"{module}.".split(".")[1] in LAYER_OF, f"{module}: name its layer in LAYERS"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    for imported in _imports(module, MODULES[module].read_text(encoding="utf-8")):
        assert imported in MODULES, f"{module} imports {imported}, which is no module"
        assert _layer(imported) <= _layer(module), f"{module} imports {imported} from a layer above its own"


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import torch
import torchtitan_lite.errors
from torchtitan_lite import cli, __version__
from torchtitan_lite.config import JobConfig, rules

def later():
    import torchtitan_lite.launch as start
    from torchtitan_lite.data.prepare import prepare
"""
    assert sorted(_imports("module", source)) == [
        "torchtitan_lite",
        "torchtitan_lite.cli",
        "torchtitan_lite.config",
        "torchtitan_lite.config.rules",
        "torchtitan_lite.data.prepare",
        "torchtitan_lite.errors",
        "torchtitan_lite.launch",
    ]
    assert (_layer("torchtitan_lite"), _layer("torchtitan_lite.config.rules"), _layer("torchtitan_lite.cli")) == (
        0,
        1,
        8,
    )


def test_no_name_stands_in_two_layers() -> None:
    assert len(LAYER_OF) == sum(len(names) for names in LAYERS)


@pytest.mark.parametrize("module", ["cli", "launch", "preflight", "status", "train"])
def test_what_starts_a_run_imports_nothing_heavy(module: str) -> None:
    program = f"import sys, torchtitan_lite.{module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == []
