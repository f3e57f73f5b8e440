"""Tasks: head, losses, metrics and gradients."""
