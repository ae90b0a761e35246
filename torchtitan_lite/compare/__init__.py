"""Recipes side by side: what differs, what it does to loss, speed and memory, and whether that is more than noise."""
