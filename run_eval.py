"""Evaluates a trained run on photos that it never saw: figures and pictures.

python run_eval.py --ckpt_dir=DIR
python run_eval.py --ckpt_dir=DIR --checkpoint=latest --split=validation
"""

from flags.command_line import run
from research.settings.program_configs import EvalConfig
from research.system.environment import import_tensorflow


def main(config: EvalConfig) -> None:
    """Evaluates as the config says; TensorFlow is imported here, after the flags proved right."""
    import_tensorflow()
    from research.evaluation.evaluate import evaluate

    evaluate(config)


if __name__ == "__main__":
    run(EvalConfig, main)
