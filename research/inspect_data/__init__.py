"""Looks through photos before training."""
