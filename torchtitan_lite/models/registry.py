"""Model families by name, or by import path for those that live outside."""

from importlib import import_module
from typing import Any

from torchtitan_lite.config.decoding import nearest
from torchtitan_lite.config.schema import Model
from torchtitan_lite.errors import UserError
from torchtitan_lite.models.spec import ModelSpec

_FAMILIES = {
    "llama3": "torchtitan_lite.models.llama3:SPEC",
    "qwen3": "torchtitan_lite.models.qwen3:SPEC",
}


def find_model(model: Model) -> tuple[ModelSpec, Any]:
    """The family and the arguments that a recipe's [model] names. Raises UserError with the names there are."""
    if model.spec:
        spec = _import_spec(model.spec)
    elif model.name in _FAMILIES:
        spec = _import_spec(_FAMILIES[model.name])
    else:
        hint = nearest(model.name, list(_FAMILIES))
        raise UserError(f'model.name = "{model.name}": there are {", ".join(_FAMILIES)}{hint}')
    if model.flavor not in spec.flavors:
        hint = nearest(model.flavor, list(spec.flavors))
        raise UserError(f'model.flavor = "{model.flavor}": {spec.name} has {", ".join(spec.flavors)}{hint}')
    return spec, spec.flavors[model.flavor]


def _import_spec(path: str) -> ModelSpec:
    module, colon, attribute = path.partition(":")
    where = f'model.spec = "{path}"'
    if not (module and colon and attribute) or module.startswith("."):
        raise UserError(f"{where}: expected package.module:SPEC")
    try:
        spec = getattr(import_module(module), attribute)
    except ImportError as error:
        raise UserError(f"{where}: {error}; is its folder on PYTHONPATH?") from None
    except AttributeError:
        raise UserError(f"{where}: module {module} has no {attribute}") from None
    if not isinstance(spec, ModelSpec):
        raise UserError(f"{where}: is a {type(spec).__name__}, expected a torchtitan_lite.models.spec.ModelSpec")
    return spec
