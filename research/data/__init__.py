"""Photos, from files on disk to batches."""
