"""What is learned: head, losses, metrics."""
