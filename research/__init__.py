"""A custom training loop that fine-tunes pretrained Keras backbones."""
