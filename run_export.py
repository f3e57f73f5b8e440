"""Exports a trained model with its preprocessing, for use without this project.

python run_export.py --ckpt_dir=DIR
python run_export.py --ckpt_dir=DIR --format=onnx --out=model.onnx
"""

from flags.command_line import run
from research.settings.program_configs import ExportConfig
from research.system.environment import import_tensorflow


def main(config: ExportConfig) -> None:
    """Exports a model. Imports TensorFlow only here, after the flags are checked."""
    import_tensorflow()
    from research.serving.export import export

    export(config)


if __name__ == "__main__":
    run(ExportConfig, main)
