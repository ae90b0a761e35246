"""What a run says of itself: log lines, metrics, events, memory, rates."""
