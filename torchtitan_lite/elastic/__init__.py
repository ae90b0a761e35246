"""What keeps a long run going through signals, hangs, faults and lost nodes."""
