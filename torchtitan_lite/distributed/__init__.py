"""The mesh, the processes on it, and one file for each way of spreading work over it."""
