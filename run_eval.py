"""Evaluates a trained run on photos that it was not trained on.

python run_eval.py --ckpt_dir=DIR
python run_eval.py --ckpt_dir=DIR --checkpoint=latest --split=validation
"""

from flags.command_line import run
from research.settings.program_configs import EvalConfig
from research.system.environment import import_tensorflow


def main(config: EvalConfig) -> None:
    """Evaluates a run. Imports TensorFlow only here, after the flags are checked."""
    import_tensorflow()
    from research.evaluation.evaluate import evaluate

    evaluate(config)


if __name__ == "__main__":
    run(EvalConfig, main)
