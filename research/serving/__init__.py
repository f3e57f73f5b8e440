"""Prediction with trained models, and their export."""
