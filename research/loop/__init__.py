"""What a training step computes with."""
