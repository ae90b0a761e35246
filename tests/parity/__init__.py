"""The proof that no mesh changes the numbers: cases, the runner that compares them, and bugs that it must catch."""
