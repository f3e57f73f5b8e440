"""What frozen layers compute, kept instead of computed in every epoch."""
