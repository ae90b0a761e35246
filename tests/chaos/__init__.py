"""Faults made on purpose: killed processes, damaged checkpoints, full disks, cut links. `make chaos` runs them all."""
