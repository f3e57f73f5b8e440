"""Updates of the weights: optimizers, learning rates, loss scale, weight averages."""
