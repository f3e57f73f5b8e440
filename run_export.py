"""Exports a trained run's model, with its preprocessing inside, for use without this project.

python run_export.py --ckpt_dir=DIR
python run_export.py --ckpt_dir=DIR --format=onnx --out=model.onnx
"""

from flags.command_line import run
from research.settings.program_configs import ExportConfig
from research.system.environment import import_tensorflow


def main(config: ExportConfig) -> None:
    """Exports as the config says; TensorFlow is imported here, after the flags proved right."""
    import_tensorflow()
    from research.serving.export import export

    export(config)


if __name__ == "__main__":
    run(ExportConfig, main)
