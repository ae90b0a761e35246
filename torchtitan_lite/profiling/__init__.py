"""Traces of some steps, what they say of where time went, snapshots of memory, and one picture of all ranks."""
