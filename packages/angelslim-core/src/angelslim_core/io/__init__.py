"""Reading and writing checkpoints, with every file treated as hostile."""
