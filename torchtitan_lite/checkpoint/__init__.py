"""Checkpoints: what is in one (manager) and when one exists (storage)."""
