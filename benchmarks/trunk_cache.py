"""The gain of caching the frozen layers' outputs, against `fit` and against the uncached step.

python -m benchmarks.trunk_cache       # about 5 minutes on two cores
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

from benchmarks.harness import data_parser, print_table, seconds_of, write_result
from research.system.environment import import_tensorflow

TUNED = {"MobileNetV2": 24, "ResNet101V2": 6}  # steps to time
HEAD_ALONE = "MobileNetV2"
EPOCHS = 4


def tuned_steps(backbone: str, steps: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Times steps that train from layer 100 on, with and without cached activations, in turns."""
    from benchmarks import peers

    run = peers.set_up_article(arguments, backbone=backbone, trunk_cache="memory")
    photos = sum(len(run.loader.examples(split)) for split in ("train", "validation"))  # decodes
    begin = time.perf_counter()
    cache = run.frozen.run(run.frozen.choose(0, None)).whole
    filling = time.perf_counter() - begin
    kinds = (
        peers.training_step(run, run.built.network, run.loader),
        peers.training_step(run, cache.network, cache.loader),
    )
    seconds = [[seconds_of(step) for step in kinds] for _ in range(3 + steps)]
    uncached, cached = map(statistics.median, zip(*seconds[3:], strict=True))
    return {
        "seconds_per_uncached_step": uncached,
        "seconds_per_cached_step": cached,
        "speedup": uncached / cached,
        "seconds_to_fill": filling,
        "photos": photos,
    }


def head_epochs(arguments: argparse.Namespace) -> dict[str, float]:
    """Times epochs that train the head alone, with `fit` and with this project, in turns.

    Validation is included and, for this project, all that `run_train.py` does in an epoch.
    """
    import keras

    from benchmarks import peers

    photos = peers.decoded_photos(arguments)
    model = peers.fit_model(HEAD_ALONE, None)
    batches = {split: peers.fit_batches(photos, split) for split in ("train", "validation")}
    ends: list[float] = []

    class Clock(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            ends.append(time.perf_counter())

    epochs: dict[str, list[float]] = {"fit": [], "ours": []}
    for _ in range(2):
        ends.clear()
        model.fit(
            batches["train"],
            epochs=EPOCHS,
            validation_data=batches["validation"],
            verbose=0,
            callbacks=[Clock()],
        )
        epochs["fit"] += [end - begin for begin, end in itertools.pairwise(ends)]
        rows = peers.train_article(
            arguments,
            backbone=HEAD_ALONE,
            unfreeze_from="none",
            epochs=4 * EPOCHS,
            trunk_cache="memory",
        )
        epochs["ours"] += [row["seconds"] - one["seconds"] for one, row in itertools.pairwise(rows)]
    fit, ours = (statistics.median(epochs[kind]) for kind in ("fit", "ours"))
    return {"fit_seconds_per_epoch": fit, "our_seconds_per_epoch": ours, "speedup": fit / ours}


def main() -> None:
    """Measures, prints and writes the figures."""
    arguments = data_parser(__doc__).parse_args()
    import_tensorflow()
    tuned = {backbone: tuned_steps(backbone, steps, arguments) for backbone, steps in TUNED.items()}
    alone = head_epochs(arguments)
    print("\nsteps that train from layer 100 on")
    print_table([{"backbone": backbone, **row} for backbone, row in tuned.items()])
    print(f"epochs that train the head of {HEAD_ALONE} alone, without each run's first")
    print_table([alone])
    write_result("trunk_cache", {"tuned": tuned, "head_alone": alone})


if __name__ == "__main__":
    main()
