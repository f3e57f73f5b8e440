"""Measures how good a trained run is."""
