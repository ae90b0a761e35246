"""Recipes: their schema, loading, rules and derived values. Nothing here imports torch."""

from torchtitan_lite.config.loading import load_config, run_folder
from torchtitan_lite.config.schema import JobConfig

__all__ = ["JobConfig", "load_config", "run_folder"]
