"""A cache of the outputs of the frozen layers."""
