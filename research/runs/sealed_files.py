"""The files of a checkpoint: `.index`, `.data-*`, and `.sha256` to tell by whether it is whole.

The file of checksums is one of `sha256sum`'s: `sha256sum -c step-20.sha256` checks by hand.
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


def files_of(prefix: Path) -> list[Path]:
    """Returns the index and the data of a checkpoint, as far as they are there."""
    name = glob.escape(prefix.name)
    return [*prefix.parent.glob(f"{name}.index"), *sorted(prefix.parent.glob(f"{name}.data-*"))]


def seal(prefix: Path) -> None:
    """Waits until the disk has a checkpoint's files, and writes their checksums beside them."""
    files = files_of(prefix)
    for file in files:
        sync(file)
    write_atomically(_sums_of(prefix), "".join(f"{_sha256(file)}  {file.name}\n" for file in files))


def move(prefix: Path, folder: Path) -> None:
    """Moves a checkpoint to another folder, its checksums last: they say that it is complete."""
    for file in [*files_of(prefix), _sums_of(prefix)]:
        os.replace(file, folder / file.name)
    sync(folder)


def link(prefix: Path, folder: Path) -> None:
    """Makes a checkpoint known in another folder too, without writing it again."""
    folder.mkdir(exist_ok=True)
    for file in [*files_of(prefix), _sums_of(prefix)]:
        partial = folder / f"{file.name}.partial"
        partial.unlink(missing_ok=True)
        try:
            os.link(file, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, partial)
            sync(partial)
        os.replace(partial, folder / file.name)
    sync(folder)


def point(folder: Path, names: Sequence[str]) -> None:
    """Names a folder's complete checkpoints, the last one last; removes the files of others."""
    # By their names alone, so that a run can be moved.
    state = tf.compat.v1.train.generate_checkpoint_state_proto(
        str(folder.absolute()), names[-1], list(names)
    )
    write_atomically(folder / POINTER, str(state))
    # Not any `*.partial`: an evaluation that watches may be writing its figures here.
    for pattern in ("step-*.index*", "step-*.data-*", "step-*.sha256*"):
        for file in folder.glob(pattern):
            if file.name.partition(".")[0] not in names or file.suffix == ".partial":
                file.unlink()


def damage_of(prefix: Path) -> str | None:
    """Says what is wrong with a checkpoint's files; None if they are whole.

    Those of a checkpoint without checksums, written by an earlier version, are taken for whole if
    they are there. What was found is remembered until a file changes.
    """
    sums = _sums_of(prefix)
    try:
        stamps = tuple(
            (str(file), file.stat().st_ino, file.stat().st_size, file.stat().st_mtime_ns)
            for file in [*files_of(prefix), *([sums] if sums.exists() else [])]
        )
        return _damage_of(prefix, stamps)
    except OSError as error:
        return f"a file cannot be read: {error.strerror}"


@functools.lru_cache(maxsize=64)
def _damage_of(prefix: Path, stamps: tuple[tuple[str, int, int, int], ...]) -> str | None:
    present = {Path(path).name for path, *_ in stamps}
    for ending in (".index", ".data"):
        if not any(name.startswith(prefix.name + ending) for name in present):
            return f"{prefix.name}{ending} is missing"
    sums = _sums_of(prefix)
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


def whole_checkpoints(folder: Path, way_out: str) -> list[str]:
    """Returns names of a folder's checkpoints, the newest whole one last; none if there are none.

    Newer ones that are not whole are left out, each with a line on standard error. Where the
    pointer file is of no use, checkpoints are found by their checksums.

    Args:
      folder: with checkpoints; need not exist.
      way_out: what a user may do if none is whole.

    Raises:
      UserError: there are some, but none is whole.
    """
    names = pointed(folder)
    # The checksums come last, when the best one is linked already: nothing is missing of these.
    unnamed = sorted(
        (file.name.removesuffix(".sha256") for file in folder.glob("step-*.sha256")), key=_age
    )
    told = []
    for candidates in (names, [name for name in unnamed if name not in names]):
        for index, name in reversed(list(enumerate(candidates))):
            damage = damage_of(folder / name)
            if damage is None:
                if not names and (folder / POINTER).exists():
                    told.append(f"{str(folder / POINTER)!r} names no checkpoint")
                for line in told:
                    tell_once(f"note: {line}; {name} is used")
                return candidates[: index + 1]
            if pointed(folder) != names:  # a run in training has gone on meanwhile
                return whole_checkpoints(folder, way_out)
            told.append(f"{str(folder / name)!r} is not whole: {damage}")
    if not told and not (folder / POINTER).exists():
        return []
    reasons = "; ".join(told) or f"{str(folder / POINTER)!r} names none"
    raise UserError(f"{str(folder)!r} holds no whole checkpoint ({reasons}); {way_out}")


def pointed(folder: Path) -> list[str]:
    """Returns the names in a folder's pointer file, the newest last; none if it says nothing.

    Those that lead out of the folder are left out.
    """
    with contextlib.suppress(ValueError, tf.errors.OpError):  # empty, no text, or no file
        state = tf.train.get_checkpoint_state(str(folder))
        if state:
            paths = map(Path, state.all_model_checkpoint_paths)
            return [path.name for path in paths if path.parent == folder]
    return []


@functools.lru_cache(maxsize=64)
def tell_once(line: str) -> None:
    """Prints a line on standard error, however often it is asked to."""
    print(line, file=sys.stderr, flush=True)


def _sums_of(prefix: Path) -> Path:
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
