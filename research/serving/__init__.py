"""Uses a trained run: prediction, export."""
