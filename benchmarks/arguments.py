"""The photos that benchmarks run on."""

from __future__ import annotations

import argparse


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Lets a benchmark run on any photos; by default on the built-in drawings, no download."""
    parser.add_argument("--dataset", default="sketches", help="a TFDS name (%(default)s)")
    parser.add_argument("--data_dir", help="where TFDS keeps prepared data sets")
