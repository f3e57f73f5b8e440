"""Checks that all workers of a run have the same settings and photos."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from research.data.loader import DataLoader
from research.runs.run_directory import PhotoEntry
from research.settings.train_config import TrainConfig, names_in_files
from research.system.errors import UserError

SPLITS_OF_A_RUN = ("train", "validation")


def check_settings(own: Sequence[Any], chief: Sequence[Any]) -> None:
    """Raises `UserError` unless this worker was given the same settings as the chief.

    Paths may differ: photos are compared by name, Python files by content, and the chief sends the
    weights to all workers.

    Args:
      own: the settings of this worker as JSON, and the digests of its Python files by setting.
      chief: those of the chief.
    """
    config, of_chief = TrainConfig.from_json(own[0]), TrainConfig.from_json(chief[0])
    differences = of_chief.differences(config)
    for name, digest in own[1].items():
        if names_in_files(config, name) == names_in_files(of_chief, name):
            differences.pop(name, None)
        if chief[1].get(name) != digest:
            differences[name] = (f"a file with SHA-256 {chief[1].get(name)}", digest)
    _raise_if_different(
        "settings",
        {
            name: differences[name]
            for name in differences
            if name not in ("image_folder", "labels", "weights")
        },
        "give all workers the same flags, or --distribution=none to train each alone",
    )


def check_data(data: Mapping[str, Any], chief: Mapping[str, Any]) -> None:
    """Raises `UserError` unless this worker has the same photos as the chief."""
    differences = {
        name: (chief[name], value)
        for name, value in data.items()
        if chief[name] != value and None not in (chief[name], value)
    }
    _raise_if_different("photos", differences, "give all workers the same photos")


def _raise_if_different(noun: str, differences: Mapping[str, tuple[Any, Any]], remedy: str) -> None:
    if differences:
        named = "; ".join(
            f"{name} is {there!r} on the chief and {here!r} on this worker"
            for name, (there, here) in differences.items()
        )
        raise UserError(f"this worker and the chief have different {noun}: {named}; {remedy}")


def describe_data(photos: DataLoader) -> dict[str, Any]:
    """Returns the number of photos of each split, and hashes of names, contents and labels."""
    described: dict[str, Any] = {}
    for split in SPLITS_OF_A_RUN:
        examples = photos.examples(split)
        described[f"{split}_photos"] = len(examples)
        described[f"{split}_names_sha256"] = _hash_of_lines(examples.names)
        known = all(examples.digests)  # not with photo_cache 'none'
        described[f"{split}_contents_sha256"] = _hash_of_lines(examples.digests) if known else None
        targets = {"label": examples.labels, **examples.arrays}
        described[f"{split}_labels_sha256"] = _hash_of_lines(
            [
                f"{name}{hashlib.sha256(array.tobytes()).hexdigest()}"
                for name, array in targets.items()
            ]
        )
    return described


def list_photos(photos: DataLoader) -> list[PhotoEntry]:
    """Returns an entry for each photo, so that an error message can name a changed photo."""
    listed = []
    for split in SPLITS_OF_A_RUN:
        examples = photos.examples(split)
        listed += [
            PhotoEntry(split, digest, name)
            for digest, name in zip(examples.digests, examples.names, strict=True)
        ]
    return listed


def _hash_of_lines(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
