"""Says what is on photos, by a trained run: label and probability a file.

python run_predict.py --ckpt_dir=DIR photo.jpg folder/
python run_predict.py --ckpt_dir=DIR --format=csv folder/ > labels.csv
"""

import sys

from flags.command_line import run_with_paths
from research.settings.program_configs import PredictConfig
from research.system.environment import import_tensorflow


def main(config: PredictConfig, paths: list[str]) -> None:
    """Predicts as the config says; TensorFlow is imported here, after the flags proved right."""
    import_tensorflow()
    from research.serving.predict import predict

    if predict(config, paths):
        sys.exit(1)


if __name__ == "__main__":
    run_with_paths(PredictConfig, main)
