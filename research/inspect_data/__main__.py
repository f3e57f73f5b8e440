"""Checks photos before training: counts, damaged files, duplicates and leaks.

python -m research.inspect_data --image_folder=PHOTOS
python -m research.inspect_data --dataset=cats_vs_dogs --out=inspection
"""

from __future__ import annotations

import sys
from pathlib import Path

from flags.command_line import run
from research.settings.program_configs import InspectConfig
from research.system.environment import import_tensorflow
from research.system.errors import UserError


def main(config: InspectConfig) -> None:
    """Inspects a data set. TensorFlow is imported here, after the flags have been checked.

    Raises:
      UserError: the photos cannot be read, or the report cannot be written.
    """
    import_tensorflow()
    from research.inspect_data.inspect import inspect
    from research.inspect_data.report import as_json, duplicate_grid, report, sample_grid
    from research.loop.open_photos import open_photos
    from research.runs.console import notes_lines, splits_lines
    from research.runs.durable_files import write_file
    from research.tasks.checks import find_task
    from research.tasks.multi_label import has_several_labels

    out = Path(config.out) if config.out else None
    if out and out.exists() and not out.is_dir():
        raise UserError(f"out is {str(out)!r}, not a folder; expected a folder or a new name")
    several = has_several_labels(find_task(config.task))
    source = open_photos(
        config, config.dataset, config.data_dir, split=config.split, several_labels=several
    )
    inspection = inspect(source, config.distance)
    if out:
        write_file(out / "inspection.json", as_json(inspection))
        write_file(out / "photos.png", sample_grid(source))
        duplicates = duplicate_grid(source, inspection)
        (out / "duplicates.png").unlink(missing_ok=True)  # of an earlier inspection
        if duplicates:
            write_file(out / "duplicates.png", duplicates)
    lines = [*splits_lines(source), *notes_lines(source)]
    print(
        "\n".join([*lines, "", report(inspection)] if lines else [report(inspection)]), flush=True
    )


if __name__ == "__main__":
    sys.argv[0] = "inspect_data"  # the name in messages and --help, instead of a long path
    run(InspectConfig, main)
