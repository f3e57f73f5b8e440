"""Looks through photos before training: counts, sizes, damaged files, duplicates and leaks.

python -m research.inspect_data --image_folder=PHOTOS
python -m research.inspect_data --dataset=cats_vs_dogs --out=inspection
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from research.settings.arguments import parse_arguments
from research.settings.program_configs import InspectConfig
from research.system.environment import import_tensorflow
from research.system.errors import UserError
from research.system.program import ended_by_a_line


def main(config: InspectConfig) -> None:
    """Inspects as the config says; TensorFlow is imported here, after the flags proved right.

    Raises:
      UserError: the photos cannot be had, or the report cannot be written.
    """
    import_tensorflow()
    # They tell of every step they take.
    for name in ("absl", "tensorflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from research.data.open_source import open_source
    from research.inspect_data.grids import duplicate_grid, sample_grid
    from research.inspect_data.inspect import inspect
    from research.inspect_data.report import as_json, report
    from research.runs.durable_files import write_file
    from research.runs.pictures import png

    out = Path(config.out) if config.out else None
    if out and out.exists() and not out.is_dir():
        raise UserError(f"out is {str(out)!r}, which is no folder; expected a folder or a new name")
    source = open_source(config.dataset, config.image_folder, config.data_dir)
    inspection = inspect(source, config.distance)
    if out:
        write_file(out / "inspection.json", as_json(inspection))
        write_file(out / "photos.png", png(sample_grid(source)))
        duplicates = duplicate_grid(source, inspection)
        (out / "duplicates.png").unlink(missing_ok=True)  # of another time
        if duplicates:
            write_file(out / "duplicates.png", png(duplicates))
    print(report(inspection), flush=True)


if __name__ == "__main__":
    with ended_by_a_line():
        main(
            parse_arguments(
                InspectConfig,
                "python -m research.inspect_data",
                "Looks through photos before training: counts, sizes, damaged files, duplicates.",
                sys.argv[1:],
            )
        )
