"""How weights are updated: optimizers, learning rates, loss scale, averages."""
