"""The folder of a run: checkpoints, records, pictures."""
