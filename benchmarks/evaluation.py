"""Photos per second of run_eval.py and run_predict.py beside `model.predict`; what figures cost.

python -m benchmarks.evaluation        # about 10 minutes on two cores

The programs read the same JPEG files and compute the same network at the same size, in new
processes that take turns: `predict` through `image_dataset_from_directory`, the others without
mirror images. The rate is that of the additional photos of a second, larger folder, so that it does
not contain imports and building.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    data_parser,
    print_table,
    seconds_to_exit,
    write_class_folders,
    write_result,
)
from research.system.environment import import_tensorflow

SIZE = 160
RUN_PREDICT = "run_predict.py"
TRAINING = ("--epochs=1", "--steps_per_epoch=1", "--unfreeze_from=none", "--nomirror_averaging")
KINDS = {
    "forward passes": ("--resamples=0", "--nopictures"),
    "with intervals": ("--nopictures",),
    "with intervals and pictures": (),
}
PREDICT = f"""
import sys, keras
folder, backbone = sys.argv[1:]
photos = keras.utils.image_dataset_from_directory(
    folder, image_size=({SIZE}, {SIZE}), batch_size=32, shuffle=False
)
classes = len(photos.class_names)
base = getattr(keras.applications, backbone)(
    input_shape=({SIZE}, {SIZE}, 3), include_top=False, weights=None
)
pooled = keras.layers.GlobalAveragePooling2D()(base.output)
model = keras.Model(base.input, keras.layers.Dense(classes)(pooled))
model.predict(photos.map(lambda image, label: image / 127.5 - 1), verbose=0)
"""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both programs on a small and a large folder; returns rates, ratios and seconds."""
    from research.data.open_source import open_source

    source = open_source(arguments.dataset, None, arguments.data_dir)
    encoded = [bytes(example.image or b"") for example in source.examples("train")]
    counts, classes = (arguments.photos // 4, arguments.photos), arguments.classes
    timed: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for count in counts:
            folder = Path(name) / str(count)
            photos = {"train": 2 * classes, "validation": classes, "test": count}
            write_class_folders(folder, encoded, photos, classes)
            training = (f"--image_folder={folder}", f"--ckpt_dir={folder}-run", *TRAINING)
            chosen = (f"--backbone={arguments.backbone}", "--weights=none", f"--image_size={SIZE}")
            more = ("--evaluation_scale=1", f"--precision={arguments.precision}")
            seconds_to_exit("run_train.py", *training, *chosen, *more)
        for _ in range(arguments.rounds):
            for count in counts:
                folder = Path(name) / str(count)
                test = str(folder / "test")
                programs: dict[str, tuple[str, ...]] = {
                    "predict": ("-c", PREDICT, test, arguments.backbone)
                }
                run = f"--ckpt_dir={folder}-run"
                programs[RUN_PREDICT] = (RUN_PREDICT, run, test)
                for kind, flags in KINDS.items():
                    programs[kind] = ("run_eval.py", run, *flags)
                for kind, program in programs.items():
                    timed.setdefault((kind, count), []).append(seconds_to_exit(*program))
    seconds = {key: statistics.median(found) for key, found in timed.items()}
    few, many = counts
    rates = {
        kind: (many - few) / (seconds[kind, many] - seconds[kind, few])
        for kind in ("predict", "forward passes", RUN_PREDICT)
    }
    whole = {kind: seconds[kind, many] for kind in ("predict", RUN_PREDICT, *KINDS)}
    return {
        "backbone": arguments.backbone,
        "precision": arguments.precision,
        "photos": many,
        "classes": classes,
        "photos_per_second": rates,
        "seconds_of_process": whole,
        "ratios": {
            "photos per second, run_eval.py / predict": rates["forward passes"] / rates["predict"],
            "photos per second, run_predict.py / predict": rates[RUN_PREDICT] / rates["predict"],
            "seconds, all / forward passes": whole["with intervals and pictures"]
            / whole["forward passes"],
        },
    }


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = data_parser(__doc__)
    parser.add_argument("--backbone", default="MobileNetV2", help="(%(default)s)")
    parser.add_argument("--precision", default="float32", help="of run_eval.py (%(default)s)")
    parser.add_argument("--photos", type=int, default=10_000, help="test photos (%(default)s)")
    parser.add_argument("--classes", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="repetitions (%(default)s)")
    arguments = parser.parse_args()
    import_tensorflow()
    figures = measure(arguments)
    for name in ("photos_per_second", "seconds_of_process", "ratios"):
        print_table([{name: key, "": value} for key, value in figures[name].items()])
    write_result("evaluation", figures)


if __name__ == "__main__":
    main()
