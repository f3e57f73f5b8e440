"""Photos a second from JPEG files to normalised batches: ours, and the article's loader.

python -m benchmarks.input             # about 2 minutes on two cores

Drawn photos, a set that TFDS prepared (any with --dataset); decoders and loaders take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.arguments import add_data_arguments
from benchmarks.record import write_result
from research.system.environment import import_tensorflow

EPOCHS = 10  # as many as the article trains


def rates(arguments: Any) -> dict[str, float]:
    """Times a first epoch, the epochs after it, the article's loader and bare decoders once."""
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from PIL import Image

    from research.data.loader import DataLoader
    from research.data.tfds_source import TfdsSource
    from research.system.machine import processors

    source = TfdsSource(arguments.dataset, arguments.data_dir)
    encoded = [bytes(example.image or b"") for example in source.examples("train")]
    count = len(encoded)

    def decode(content: bytes) -> None:
        Image.open(io.BytesIO(content)).load()

    def article(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.image.resize(tf.cast(image, tf.float32) / 127.5 - 1, (160, 160)), label

    stored = tfds.load(
        arguments.dataset, split="train[:80%]", as_supervised=True, data_dir=arguments.data_dir
    )
    seconds = {}
    begin = time.perf_counter()
    seen = sum(int(image.shape[0]) for image, _ in stored.map(article).batch(32))
    # As if it had read as many photos as the others.
    seconds["article_epoch"] = (time.perf_counter() - begin) * count / seen
    begin = time.perf_counter()
    loader = DataLoader(160, 32, source=source)
    for batch in loader.epoch_batches(0):
        del batch
    seconds["our_first_epoch"] = time.perf_counter() - begin
    later = []
    for epoch in range(1, 4):
        begin = time.perf_counter()
        for batch in loader.epoch_batches(epoch):
            del batch
        later.append(time.perf_counter() - begin)
    seconds["our_later_epoch"] = statistics.median(later)
    begin = time.perf_counter()
    for content in encoded:
        decode(content)
    seconds["bare_decoder_one_thread"] = time.perf_counter() - begin
    begin = time.perf_counter()
    with ThreadPoolExecutor(processors()) as pool:
        list(pool.map(decode, encoded))
    seconds["bare_decoder_all_threads"] = time.perf_counter() - begin
    all_epochs = seconds["our_first_epoch"] + (EPOCHS - 1) * seconds["our_later_epoch"]
    return {
        **{name: count / taken for name, taken in seconds.items()},
        "our_ten_epochs": EPOCHS * count / all_epochs,
    }


def waiting(arguments: Any) -> list[float]:
    """Trains MobileNetV2 on decoded photos; returns each epoch's share of waiting for input."""
    from benchmarks.peers import article
    from research.train import train

    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(
            article(),
            dataset=arguments.dataset,
            data_dir=arguments.data_dir,
            backbone="MobileNetV2",
            epochs=3,
            horizontal_flip=True,
            colour_jitter=0.2,
            random_crop_area=0.5,
            ckpt_dir=str(Path(folder) / "run"),
        )
        directory = train(config)
        assert directory is not None
        return [row["share_of_step_waiting_for_input"] for row in directory.read_metrics()]


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    import_tensorflow()
    from research.data.tfds_source import TfdsSource

    TfdsSource(arguments.dataset, arguments.data_dir).count("train")
    rounds = [rates(arguments) for _ in range(arguments.rounds)]
    figures: dict[str, Any] = {
        name: statistics.median(one[name] for one in rounds) for name in rounds[0]
    }
    article, decoder = figures["article_epoch"], figures["bare_decoder_all_threads"]
    figures["ratios"] = {
        "our first epoch / article": figures["our_first_epoch"] / article,
        "our later epochs / article": figures["our_later_epoch"] / article,
        "our ten epochs / article": figures["our_ten_epochs"] / article,
        "our first epoch / bare decoder": figures["our_first_epoch"] / decoder,
    }
    figures["share_of_step_waiting_for_input"] = waiting(arguments)
    print(json.dumps(figures, indent=2))
    print(f"written to {write_result('input', figures)}")


if __name__ == "__main__":
    main()
