"""The size of each backbone, and the speed of its training steps against MobileNetV2's.

python -m benchmarks.backbone_cost                # at most 40 minutes on two cores; can be resumed
python -m benchmarks.backbone_cost --only VGG16 ViTTiny
python -m benchmarks.backbone_cost --report       # only writes the table into docs/backbones.md

The last fifth of each network is trained: the fewest last layers that have at least a fifth of the
multiply-adds. The steps are those of `run_train.py` in float32, with RMSprop, frozen BatchNorm and
random weights, on pixels drawn at random: one step that runs the frozen layers, and one from their
cached outputs. A large network has smaller batches. Each step takes turns with a step of
MobileNetV2, so that other load on the machine hardly changes the ratio of their speeds. The process
uses two cores.

Networks of the table that have no result are measured, and each result is added to
`benchmarks/results/backbone_cost.json` at once. Remove this file to measure all of them again.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import (
    ARTICLE,
    ROOT,
    read_rows,
    seconds_of,
    write_report,
    write_result,
)
from flags.command_line import parse_config
from research.models.backbone import Backbone, build_backbone
from research.models.backbone_table import BACKBONES, find_backbone
from research.settings.train_config import TrainConfig
from research.system.environment import import_tensorflow
from research.system.errors import one_line
from research.system.program import ended_by_a_line

if TYPE_CHECKING:
    import keras

NAME = "backbone_cost"
REFERENCE = "MobileNetV2"
CORES = 2
IMAGE_SIZE = 160  # or the nearest size that fits the backbone
TRAINED_SHARE = 0.2  # of the multiply-adds
# A step of this many multiply-adds takes about a second on two cores.
OPERATIONS_PER_BATCH = 16e9
SMALLEST_BATCH, LARGEST_BATCH = 4, 32
FEWEST_TURNS, MOST_TURNS = 3, 12
SECONDS = 8.0  # for the turns of a network, if these are enough for the fewest
LONGEST_SECONDS = 60.0  # for the fewest turns; slower networks get no speed
EXPECTED_SECONDS = 30.0  # for a network, with building and tracing, if there are no results yet
UNCOUNTED = ("attention", "conv", "dot", "einsum")  # in the names of classes


def multiply_adds(operation: keras.Operation) -> int:
    """Returns the multiplications, each with an addition, of an operation for one photo.

    Counted are products with kernels and products of tensors, as in attention. What is computed
    once per batch, such as the position embeddings of another image size, is not counted.

    Args:
      operation: of a functional model: a layer, an operation of `keras.ops`, or a model.

    Raises:
      ValueError: an operation multiplies in a way that is not known here.
    """
    import keras

    from research.models.cost import multiplications

    if isinstance(operation, keras.Model):
        return sum(map(multiply_adds, _operations(operation)))
    (output, *_) = keras.tree.flatten(operation.output)
    kind = type(operation).__name__
    if output.shape[0] is not None:
        return 0
    if kind == "Matmul":
        (first, _) = keras.tree.flatten(operation.input)
        return math.prod(output.shape[1:]) * first.shape[-1]
    unknown = {word for word in UNCOUNTED if word in kind.lower()}
    if isinstance(operation, keras.layers.Layer) and unknown <= {"conv"}:
        return multiplications(operation)
    if unknown:
        raise ValueError(f"the multiplications of {operation.name}, of class {kind}, are not known")
    return 0


def _operations(model: keras.Model) -> Sequence[keras.Operation]:
    import keras

    return model.layers if isinstance(model, keras.Sequential) else model.operations


def first_of_share(model: keras.Model, share: float) -> int:
    """Returns the index of the last layer from which on at least a share of the work is done.

    Args:
      model: a functional model.
      share: of the multiply-adds of the model, above 0 and at most 1.
    """
    costs = list(map(multiply_adds, model.operations))
    left, starts = sum(costs), []
    places = {id(layer): index for index, layer in enumerate(model.layers)}
    for operation, cost in zip(model.operations, costs, strict=True):
        if id(operation) in places and left >= share * sum(costs):
            starts.append(places[id(operation)])
        left -= cost
    return max(starts)


def size_for(backbone: Backbone, wanted: int = IMAGE_SIZE) -> int:
    """Returns the largest image size up to `wanted` that fits, or else the smallest that fits."""
    return max(backbone.minimum_size, wanted - wanted % backbone.patch)


def sizes_text(backbone: Backbone) -> str:
    """Returns the image sizes that a backbone takes, in words."""
    if backbone.patch == 1:
        return f"from {backbone.minimum_size}"
    return f"multiples of {backbone.patch}, from {backbone.minimum_size}"


def batch_for(operations: float) -> int:
    """Returns the photos in a batch, a power of two: fewer for a network of more multiply-adds."""
    power = math.floor(math.log2(max(OPERATIONS_PER_BATCH / max(operations, 1.0), 1.0)))
    return min(max(2**power, SMALLEST_BATCH), LARGEST_BATCH)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Functions that make a training step of a network on a batch of photos.

    Attributes:
      batch: number of photos in a batch.
      uncached: makes a step that runs the frozen layers.
      cached: makes a step from their cached outputs.
    """

    batch: int
    uncached: Callable[[], object]
    cached: Callable[[], object]


def steps_of(name: str, size: int, batch: int, first: int) -> Steps:
    """Builds the training steps of a backbone.

    Args:
      name: of the backbone.
      size: image height and width in pixels.
      batch: number of photos in a batch.
      first: index of the first layer to train.
    """
    import numpy as np
    import tensorflow as tf

    from benchmarks import peers
    from benchmarks.tasks import DividedSource
    from research.data.source import Example
    from research.loop.preparation import set_up
    from research.system.team import Team

    flags = [*ARTICLE, f"--backbone={name}", f"--image_size={size}", f"--batch_size={batch}"]
    flags += [f"--unfreeze_from={first}", "--trunk_cache=memory"]
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (batch, size, size, 3), np.uint8)
    photos = [Example(image, index % 2, str(index)) for index, image in enumerate(pixels)]
    source = DividedSource(("a", "b"), {"train": photos})
    run = set_up(parse_config(TrainConfig, flags), Team(tf.distribute.get_strategy()), source)
    whole = run.frozen.run(run.frozen.choose(0, None)).whole
    uncached = peers.training_step(run, run.built.network, run.loader)
    return Steps(batch, uncached, peers.training_step(run, whole.network, whole.loader))


def speeds(steps: Steps, reference: Steps) -> dict[str, float] | None:
    """Times the steps of a network in turns with the uncached step of the reference.

    Returns:
      The median of the reference's photos per second; and for both steps, the median of the ratios
      of the photos per second to the reference's, turn by turn. None if a step takes too long.
    """
    kinds = (reference.uncached, steps.uncached, steps.cached)
    for step in kinds:
        step()  # traces
    turns: list[list[float]] = []
    begin = time.perf_counter()
    while len(turns) < FEWEST_TURNS or (
        len(turns) < MOST_TURNS and time.perf_counter() < begin + SECONDS
    ):
        turns.append([seconds_of(step) for step in kinds])
        if sum(turns[0]) * FEWEST_TURNS > LONGEST_SECONDS:
            return None
    rates = [[steps.batch / own for own in turn[1:]] for turn in turns]
    base = [reference.batch / turn[0] for turn in turns]
    uncached, cached = (
        statistics.median(rate / other for rate, other in zip(column, base, strict=True))
        for column in zip(*rates, strict=True)
    )
    return {"reference": statistics.median(base), "uncached": uncached, "cached": cached}


def measure(name: str, reference: Steps) -> dict[str, Any]:
    """Counts the parameters and multiply-adds of a backbone, and times its steps."""
    begin = time.perf_counter()
    backbone = find_backbone(name)
    size = size_for(backbone)
    model = build_backbone(backbone, size, None)
    operations = sum(map(multiply_adds, model.operations))
    first, batch = first_of_share(model, TRAINED_SHARE), batch_for(operations)
    start = model.operations.index(model.layers[first])
    row = {
        "backbone": name,
        "parameters": model.count_params(),
        "multiply_adds": operations,
        "image_size": size,
        "image_sizes": sizes_text(backbone),
        "first_trained_layer": model.layers[first].name,
        "trained_share": sum(map(multiply_adds, model.operations[start:])) / operations,
        "batch_size": batch,
    }
    del model
    row["speeds"] = speeds(steps_of(name, size, batch, first), reference)
    return {**row, "seconds": time.perf_counter() - begin}


def measure_all(names: Sequence[str]) -> list[str]:
    """Measures the backbones that have no result on file; returns the names of those that failed.

    Raises:
      UserError: a name is not in the table, or the results on file are of another machine.
    """
    rows, order = read_rows(NAME), [*BACKBONES, *names]
    done = {row["backbone"] for row in rows}
    missing = [find_backbone(name).name for name in names if name not in done]
    expected = statistics.mean([row["seconds"] for row in rows] or [EXPECTED_SECONDS])
    print(f"{len(missing)} backbones, about {len(missing) * expected / 60:.0f} minutes", flush=True)
    if not missing:
        return []
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    import_tensorflow()
    base = find_backbone(REFERENCE)
    model = build_backbone(base, IMAGE_SIZE, None)
    first = first_of_share(model, TRAINED_SHARE)
    reference = steps_of(REFERENCE, IMAGE_SIZE, LARGEST_BATCH, first)
    failed = []
    for name in missing:
        try:
            row = measure(name, reference)
        except Exception as error:  # of one network; the others are measured nevertheless
            failed.append(name)
            print(f"{name} failed: {one_line(error)}", file=sys.stderr, flush=True)
            continue
        rows.append(row)
        print(row_text(row, row["speeds"] and row["speeds"]["reference"]), flush=True)
        rows.sort(key=lambda one: order.index(one["backbone"]))
        write_result(NAME, {"reference": REFERENCE, "cores_used": CORES, "rows": rows})
        gc.collect()  # TensorFlow's objects refer to each other, and hold the weights
    return failed


def row_text(row: dict[str, Any], rate: float | None) -> str:
    """Returns a row of the Markdown table.

    Args:
      row: a result.
      rate: photos per second of the reference, by which the relative speeds are multiplied.
    """
    cells = [f"`{row['backbone']}`", f"{row['parameters'] / 1e6:.1f}"]
    cells += [f"{row['multiply_adds'] / 1e9:.2f}", str(row["image_size"]), row["image_sizes"]]
    if row["speeds"] is None:
        cells += ["too slow", "too slow"]
    else:
        cells += [f"{rate * row['speeds'][kind]:.3g}" for kind in ("uncached", "cached")]
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the results as a Markdown table, in the order of the table of backbones.

    Photos per second are the ratios to the reference, times the median of the reference's speed
    over all rows.
    """
    columns = (
        "backbone",
        "parameters, million",
        "multiply-adds, billion",
        "at pixels",
        "image sizes",
        "photos/s",
        "photos/s, cached",
    )
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    rates = [row["speeds"]["reference"] for row in rows if row["speeds"]]
    rate = statistics.median(rates) if rates else None
    return "\n".join([*lines, *(row_text(row, rate) for row in rows)])


def main() -> None:
    """Measures the missing backbones, prints the table and writes it into the document."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="backbones; default: all")
    parser.add_argument("--report", action="store_true", help="only write the table")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "backbones.md")
    arguments = parser.parse_args()
    with ended_by_a_line():
        failed = [] if arguments.report else measure_all(arguments.only or list(BACKBONES))
        text = table(read_rows(NAME))
        write_report(NAME, text, arguments.document)
        print(text)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command tries them again")


if __name__ == "__main__":
    main()
