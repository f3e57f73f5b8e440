"""A cache of what the frozen layers compute."""
