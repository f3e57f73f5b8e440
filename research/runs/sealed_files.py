"""The files of a checkpoint: `.index`, `.data-*`, and `.sha256` with the checksums of the others.

`sha256sum -c step-20.sha256` verifies a checkpoint without this project.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import tensorflow as tf

from research.runs.durable_files import sync, write_atomically
from research.system.errors import UserError

POINTER = "checkpoint"


def _data_files(prefix: Path) -> list[Path]:
    """Returns the existing index and data files of a checkpoint."""
    name = glob.escape(prefix.name)
    return [*prefix.parent.glob(f"{name}.index"), *sorted(prefix.parent.glob(f"{name}.data-*"))]


def seal(prefix: Path) -> None:
    """Waits until a checkpoint's files are on disk, and writes their checksums."""
    files = _data_files(prefix)
    for file in files:
        sync(file)
    sums = "".join(f"{_sha256(file)}  {file.name}\n" for file in files)
    write_atomically(_checksum_file(prefix), sums)


def move(prefix: Path, folder: Path) -> None:
    """Moves a checkpoint to another folder. The checksums come last and mark it as complete."""
    for file in [*_data_files(prefix), _checksum_file(prefix)]:
        os.replace(file, folder / file.name)
    sync(folder)


def link(prefix: Path, folder: Path) -> None:
    """Adds a checkpoint to another folder by hard links, or by copies if links are unsupported."""
    folder.mkdir(exist_ok=True)
    for file in [*_data_files(prefix), _checksum_file(prefix)]:
        partial = folder / f"{file.name}.partial"
        partial.unlink(missing_ok=True)
        try:
            os.link(file, partial)
        except OSError:
            shutil.copyfile(file, partial)
            sync(partial)
        os.replace(partial, folder / file.name)
    sync(folder)


def point(folder: Path, names: Sequence[str]) -> None:
    """Writes a folder's checkpoint names, oldest first, to its pointer file; removes all others."""
    # Names without a folder, so that a run can be moved.
    state = tf.compat.v1.train.generate_checkpoint_state_proto(
        str(folder.absolute()), names[-1], list(names)
    )
    write_atomically(folder / POINTER, str(state))
    # Not every `*.partial`: `run_eval.py --watch` may be writing its results here.
    for pattern in ("step-*.index*", "step-*.data-*", "step-*.sha256*"):
        for file in folder.glob(pattern):
            if file.name.partition(".")[0] not in names or file.suffix == ".partial":
                file.unlink()


def fingerprint_of(prefix: Path) -> str:
    """Returns a hash that tells the weights of a checkpoint from others.

    It is that of the file with the checksums. A checkpoint of an earlier version has none; its
    index file contains a checksum of each variable.

    Raises:
      FileNotFoundError: the checkpoint was removed.
    """
    try:
        return _sha256(_checksum_file(prefix))
    except FileNotFoundError:
        return _sha256(prefix.with_name(f"{prefix.name}.index"))


def damage_of(prefix: Path) -> str | None:
    """Returns how a checkpoint's files are damaged; None if they are intact.

    A checkpoint without checksums, written by an earlier version, counts as intact if its files
    exist. The result is cached until a file changes.
    """
    sums = _checksum_file(prefix)
    try:
        stamps = tuple(
            (str(file), file.stat().st_ino, file.stat().st_size, file.stat().st_mtime_ns)
            for file in [*_data_files(prefix), *([sums] if sums.exists() else [])]
        )
        return _damage_of(prefix, stamps)
    except OSError as error:
        return f"a file cannot be read: {error.strerror}"


@functools.lru_cache(maxsize=64)
def _damage_of(prefix: Path, stamps: tuple[tuple[str, int, int, int], ...]) -> str | None:
    present = {Path(path).name for path, *_ in stamps}
    for extension in (".index", ".data"):
        if not any(name.startswith(prefix.name + extension) for name in present):
            return f"{prefix.name}{extension} is missing"
    sums = _checksum_file(prefix)
    if sums.name not in present:
        return None
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines()
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in sorted({*expected, *present - {sums.name}}):
        if name not in present:
            return f"{name} is missing"
        if expected.get(name) != _sha256(prefix.with_name(name)):
            return f"{name} does not match its checksum"
    return None


def intact_checkpoints(
    folder: Path, way_out: str = "restore one from a backup, or remove the folder to start over"
) -> list[str]:
    """Returns names of a folder's checkpoints, oldest first, up to the newest intact one.

    The list is empty if the folder has no checkpoint. Damaged checkpoints after the newest intact
    one are reported on standard error. If the pointer file is unusable, checkpoints are found by
    their checksum files.

    Args:
      folder: contains the checkpoints; need not exist.
      way_out: what the user can do if all checkpoints are damaged.

    Raises:
      UserError: all checkpoints are damaged.
    """
    names = pointed(folder)
    # A checkpoint with checksums is complete: they are moved to the folder last.
    unnamed = sorted(
        (file.name.removesuffix(".sha256") for file in folder.glob("step-*.sha256")), key=_age
    )
    notes = []
    for candidates in (names, [name for name in unnamed if name not in names]):
        for index, name in reversed(list(enumerate(candidates))):
            damage = damage_of(folder / name)
            if damage is None:
                if not names and (folder / POINTER).exists():
                    notes.append(f"{str(folder / POINTER)!r} names no checkpoint")
                for note in notes:
                    _print_once(f"note: {note}; {name} is used")
                return candidates[: index + 1]
            if pointed(folder) != names:  # a run in training has saved a checkpoint meanwhile
                return intact_checkpoints(folder, way_out)
            notes.append(f"{str(folder / name)!r} is damaged: {damage}")
    if not notes and not (folder / POINTER).exists():
        return []
    reasons = "; ".join(notes) or f"{str(folder / POINTER)!r} names no checkpoint"
    raise UserError(f"{str(folder)!r} holds no intact checkpoint ({reasons}); {way_out}")


def pointed(folder: Path) -> list[str]:
    """Returns the names in a folder's pointer file, from the oldest to the newest.

    Paths outside the folder are ignored. The list is empty if the file is missing or unreadable.
    """
    with contextlib.suppress(ValueError, tf.errors.OpError):
        state = tf.train.get_checkpoint_state(str(folder))
        if state:
            paths = map(Path, state.all_model_checkpoint_paths)
            return [path.name for path in paths if path.parent == folder]
    return []


@functools.lru_cache(maxsize=64)
def _print_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _checksum_file(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.sha256")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        digest = hashlib.sha256()
        while part := content.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _age(name: str) -> tuple[int, bool]:
    _, digits, *unvalidated = name.split("-")
    return int(digits) if digits.isdecimal() else -1, not unvalidated
