"""Photos per second from JPEG files to normalised batches: this project and the article's loader.

python -m benchmarks.input             # about 2 minutes on two cores

The photos are a data set prepared by TFDS, by default the sketches. They are read again until there
are as many as the article trains on. Decoders and loaders take turns.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import (
    data_parser,
    print_table,
    seconds_of,
    write_class_folders,
    write_result,
)
from research.data.source import Example, Source
from research.system.environment import import_tensorflow

EPOCHS, PHOTOS = 10, 18_610  # as in the article: 80 % of Cats vs Dogs
HELD_PHOTOS = 512  # whose memory is freed at a time
# Each epoch waits once for its first batch. With fewer photos, that is most of the time of waiting.
WAITING_PHOTOS = 6400


class Repeated(Source):
    """The training photos of a source, again and again, until there are `PHOTOS`.

    A virtual machine gets memory from its host when it is first used, and can return it a few
    seconds after it is free. This takes longer than to decode photos. Therefore this source holds
    as much memory as the decoded photos need, and frees it while they are written.
    """

    def __init__(self, source: Source) -> None:
        self.class_names = source.class_names
        self._source = source
        self._held = [
            np.ones((HELD_PHOTOS, 160, 160, 3), np.uint8) for _ in range(PHOTOS // HELD_PHOTOS)
        ]

    def count(self, split: str) -> int:
        return PHOTOS

    def examples(self, split: str) -> Iterator[Example]:
        turns = itertools.repeat(split)
        photos = itertools.chain.from_iterable(map(self._source.examples, turns))
        for index, photo in enumerate(itertools.islice(photos, PHOTOS)):
            if index % HELD_PHOTOS == 0:
                del self._held[-1:]
            yield photo


def rates(arguments: argparse.Namespace) -> dict[str, float]:
    """Times the article's loader, this project's first and later epochs, and bare decoders."""
    import tensorflow_datasets as tfds
    from PIL import Image

    from benchmarks.peers import scale_and_resize
    from research.data.loader import DataLoader
    from research.data.tfds_source import TfdsSource
    from research.system.machine import processors

    source = TfdsSource(arguments.dataset, arguments.data_dir)
    encoded = [bytes(example.image or b"") for example in source.examples("train")]

    def decode(content: bytes) -> None:
        Image.open(io.BytesIO(content)).load()

    def decode_in_threads() -> None:
        with ThreadPoolExecutor(processors()) as pool:
            list(pool.map(decode, encoded))

    def read_epoch(loader: DataLoader, epoch: int) -> None:
        for batch in loader.epoch_batches(epoch):
            del batch

    stored = tfds.load(
        arguments.dataset,
        split="train[:80%]",
        as_supervised=True,
        data_dir=arguments.data_dir,
        read_config=tfds.ReadConfig(try_autocache=False),  # TFDS only keeps small data sets decoded
    )
    stored = stored.repeat().take(PHOTOS)
    seconds = {}
    begin = time.perf_counter()
    for batch in stored.map(scale_and_resize).batch(32):
        del batch
    seconds["article_epoch"] = time.perf_counter() - begin
    repeated = Repeated(source)
    begin = time.perf_counter()
    loader = DataLoader(160, 32, source=repeated)
    read_epoch(loader, 0)
    seconds["our_first_epoch"] = time.perf_counter() - begin
    later = [seconds_of(functools.partial(read_epoch, loader, epoch)) for epoch in range(1, 4)]
    seconds["our_later_epoch"] = statistics.median(later)
    all_epochs = seconds["our_first_epoch"] + (EPOCHS - 1) * seconds["our_later_epoch"]
    bare = {
        "bare_decoder_one_thread": len(encoded) / seconds_of(lambda: list(map(decode, encoded))),
        "bare_decoder_all_threads": len(encoded) / seconds_of(decode_in_threads),
    }
    return {
        **{name: PHOTOS / taken for name, taken in seconds.items()},
        "our_ten_epochs": EPOCHS * PHOTOS / all_epochs,
        **bare,
    }


def ratios(measured: Mapping[str, float]) -> dict[str, float]:
    """Returns the rates of one round relative to each other."""
    article = measured["article_epoch"]
    return {
        "our first epoch / article": measured["our_first_epoch"] / article,
        "our later epochs / article": measured["our_later_epoch"] / article,
        "our ten epochs / article": measured["our_ten_epochs"] / article,
        "our first epoch / bare decoder": measured["our_first_epoch"]
        / measured["bare_decoder_all_threads"],
    }


def waiting(encoded: Sequence[bytes], photo_cache: str) -> list[float]:
    """Trains MobileNetV2 on augmented photos; returns the share of waiting for each epoch.

    Args:
      encoded: contents of JPEG files. Their classes do not matter.
      photo_cache: `memory`, or `none` to decode each photo for each step.
    """
    from benchmarks.peers import train_article

    with tempfile.TemporaryDirectory() as folder:
        counts = {"train": WAITING_PHOTOS, "validation": 64}
        write_class_folders(Path(folder), encoded, counts, classes=2)
        rows = train_article(
            argparse.Namespace(dataset="cats_vs_dogs", data_dir=None),
            image_folder=folder,
            photo_cache=photo_cache,
            backbone="MobileNetV2",
            epochs=3,
            horizontal_flip=True,
            colour_jitter=0.2,
            random_crop_area=0.5,
        )
    return [row["share_of_step_waiting_for_input"] for row in rows]


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = data_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (%(default)s)")
    arguments = parser.parse_args()
    import_tensorflow()
    from research.data.tfds_source import TfdsSource

    source = TfdsSource(arguments.dataset, arguments.data_dir)
    source.count("train")  # prepares the data set
    rounds = [rates(arguments) for _ in range(arguments.rounds)]
    figures: dict[str, Any] = {
        name: statistics.median(one[name] for one in rounds) for name in rounds[0]
    }
    compared = [ratios(one) for one in rounds]
    relative = {name: sorted(one[name] for one in compared) for name in compared[0]}
    encoded = [bytes(example.image or b"") for example in source.examples("train")]
    shares = {cache: waiting(encoded, cache) for cache in ("memory", "none")}
    print_table([{"photos per second": name, "": rate} for name, rate in figures.items()])
    print_table(
        [
            {
                "ratio": name,
                "median": statistics.median(found),
                "least": found[0],
                "most": found[-1],
            }
            for name, found in relative.items()
        ]
    )
    for cache, share in shares.items():
        print(f"share of each step spent waiting for input, per epoch, {cache}: {share}")
    write_result(
        "input",
        {**figures, "ratios_of_rounds": relative, "share_of_step_waiting_for_input": shares},
    )


if __name__ == "__main__":
    main()
