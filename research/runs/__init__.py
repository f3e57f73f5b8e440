"""Files and output of a training run: checkpoints, metrics, TensorBoard events, pictures."""
