"""PyTorch-native LLM pre-training that composes parallelisms and keeps its numbers.

Importing the package imports no torch: the launcher checks a recipe before it pays for that.
"""

__version__ = "0.1.0"
