"""Fine-tunes a pretrained Keras backbone on photos with a custom training loop.

python run_train.py --unfreeze_from=100 --epochs=10
python run_train.py --image_folder=PHOTOS --unfreeze_from=conv5
"""

from flags.command_line import run
from research.settings.train_config import TrainConfig
from research.system.environment import import_tensorflow


def main(config: TrainConfig) -> None:
    """Trains a model. Imports TensorFlow only here, after the flags are checked."""
    import_tensorflow()
    from research.train import train

    train(config)


if __name__ == "__main__":
    run(TrainConfig, main)
