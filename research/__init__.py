"""A custom training loop that fine-tunes pretrained Keras backbones."""

from research.system.environment import prepare

prepare()  # before any module of this package imports Keras or TensorFlow
