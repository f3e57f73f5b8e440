"""The files of a run: whole or not there, one process at a time, checked before use."""
