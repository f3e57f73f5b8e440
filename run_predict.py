"""Classifies photos with a trained model: a label and a probability per file.

python run_predict.py --ckpt_dir=DIR photo.jpg folder/
python run_predict.py --ckpt_dir=DIR --format=csv folder/ > labels.csv
"""

import sys

from flags.command_line import run
from research.settings.program_configs import PredictConfig
from research.system.environment import import_tensorflow


def main(config: PredictConfig, paths: list[str]) -> None:
    """Classifies photos. Imports TensorFlow only here, after the flags are checked."""
    import_tensorflow()
    from research.serving.predict import predict

    if predict(config, paths):
        sys.exit(1)


if __name__ == "__main__":
    run(PredictConfig, main, takes_paths=True, stop_at_output_error=True)
