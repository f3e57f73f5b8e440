"""What keeping the frozen layers' outputs brings, against `fit` and against our own step without.

python -m benchmarks.trunk_cache       # about 5 minutes on two cores
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.arguments import add_data_arguments
from benchmarks.record import write_result
from research.system.environment import import_tensorflow

TUNED = {"MobileNetV2": 24, "ResNet101V2": 6}  # and the steps that are timed of each
HEAD_ALONE = "MobileNetV2"
EPOCHS = 4


def timed(action: Callable[[], object]) -> float:
    """Returns the seconds that an action takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def tuned_steps(backbone: str, steps: int, arguments: Any) -> dict[str, float]:
    """Times our step from 100 on with and without cached activations, in turns."""
    from benchmarks import peers
    from research.training.trunk.frozen_layers import FrozenLayers

    photos = peers.photos_of(arguments)
    config = dataclasses.replace(peers.article(), backbone=backbone, trunk_cache="memory")
    ours = peers.our_run(config, photos)
    whole = ours.learner()
    begin = time.perf_counter()
    frozen = FrozenLayers(
        ours.built.network, photos, ours.plan, 0, config.trunk_cache, config.cache_dir
    )
    feeds = frozen.run(frozen.choose(0, None))
    filling = time.perf_counter() - begin
    cached = dataclasses.replace(
        ours, built=dataclasses.replace(ours.built, network=feeds.whole.network)
    ).learner()
    without, given = peers.endless(photos), peers.endless(feeds.whole.loader)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(3 + steps):
        seconds[0].append(timed(lambda: whole.train_steps(without, 1)))
        seconds[1].append(timed(lambda: cached.train_steps(given, 1)))
    uncached, from_cache = (statistics.median(kind[3:]) for kind in seconds)
    return {
        "seconds_a_step_without": uncached,
        "seconds_a_step_with": from_cache,
        "times_as_fast": uncached / from_cache,
        "seconds_to_fill": filling,
        "photos": len(photos.examples("train")) + len(photos.examples("validation")),
    }


def head_epochs(arguments: Any) -> dict[str, float]:
    """Times epochs of the head alone, validation included, in turns with those of `fit`.

    Ours are those of run_train.py, checkpoints, TensorBoard and all.
    """
    import keras

    from benchmarks import peers
    from research.runs.run_directory import RunDirectory
    from research.train import train

    photos = peers.photos_of(arguments)
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
        with tempfile.TemporaryDirectory() as folder:
            config = dataclasses.replace(
                peers.article(),
                dataset=arguments.dataset,
                data_dir=arguments.data_dir,
                backbone=HEAD_ALONE,
                unfreeze_from="none",
                epochs=4 * EPOCHS,
                trunk_cache="memory",
                ckpt_dir=str(Path(folder) / "run"),
            )
            directory = train(config)
            assert isinstance(directory, RunDirectory)
            stamps = [row["seconds"] for row in directory.read_metrics()]
        epochs["ours"] += [end - begin for begin, end in itertools.pairwise(stamps)]
    seconds = {kind: statistics.median(values) for kind, values in epochs.items()}
    return {
        "fit_seconds_an_epoch": seconds["fit"],
        "our_seconds_an_epoch": seconds["ours"],
        "times_as_fast": seconds["fit"] / seconds["ours"],
    }


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    arguments = parser.parse_args()
    import_tensorflow()
    tuned = {backbone: tuned_steps(backbone, steps, arguments) for backbone, steps in TUNED.items()}
    alone = head_epochs(arguments)
    print("\nsteps from layer 100 on, seconds without and with cached activations")
    for backbone, row in tuned.items():
        print(
            f"  {backbone:<14}{row['seconds_a_step_without']:>8.3f}"
            f"{row['seconds_a_step_with']:>8.3f}: {row['times_as_fast']:.2f} times as fast, after "
            f"{row['seconds_to_fill']:.1f} s for {row['photos']:,} photos"
        )
    print(f"epochs of the head of {HEAD_ALONE} after the first, seconds of fit and ours")
    print(
        f"  {alone['fit_seconds_an_epoch']:.2f} {alone['our_seconds_an_epoch']:.3f}: "
        f"{alone['times_as_fast']:.0f} times as fast"
    )
    print(f"written to {write_result('trunk_cache', {'tuned': tuned, 'head_alone': alone})}")


if __name__ == "__main__":
    main()
