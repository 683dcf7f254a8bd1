"""A run: its configuration, the objects built from it, the loop, checkpoints and the folder on disk."""
