"""Prepares the environment before TensorFlow is imported. This module does not import it."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import IO

from research.system.errors import UserError
from research.system.interruption import at_once
from research.system.machine import processors


def prepare() -> None:
    """Sets the environment variables that TensorFlow and Keras read at import.

    Keras must use TensorFlow, and TensorFlow must use Keras 3; a note on standard error says it if
    the user set something else. The other variables are only set if the user did not set them:
    oneDNN is off by default on CPUs without AVX-512, where it makes a train step about three
    times faster. Log level 2 hides TensorFlow's messages below errors. In a container with a
    processor quota, TensorFlow would start one thread per processor of the host.
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(processors()))
    if os.environ.get("KERAS_BACKEND", "tensorflow") not in ("", "tensorflow"):
        _note(
            f"KERAS_BACKEND is {os.environ['KERAS_BACKEND']!r}, but this project needs tensorflow"
        )
    os.environ["KERAS_BACKEND"] = "tensorflow"  # also overrules keras.json
    if os.environ.pop("TF_USE_LEGACY_KERAS", "0").lower() in ("true", "1"):
        _note("TF_USE_LEGACY_KERAS is set, but this project needs Keras 3")


def check_keras_file() -> None:
    """Raises `UserError` if Keras and TensorFlow cannot be imported because of `keras.json`."""
    home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    file = os.path.join(home, "keras.json")
    try:
        with open(file, encoding="utf-8") as opened:
            found = json.load(opened)
    except (OSError, ValueError):  # Keras ignores the file
        return
    accepted = {
        "floatx": ("float16", "float32", "float64"),
        "image_data_format": ("channels_last", "channels_first"),
    }
    if isinstance(found, dict):
        wrong = [
            f"{name} {found[name]!r}"
            for name, choices in accepted.items()
            if found.get(name, choices[0]) not in choices
        ]
        if not isinstance(found.get("epsilon", 1e-7), float):
            wrong.append(f"epsilon {found['epsilon']!r}")
    else:
        wrong = ["no object in braces"]
    if wrong:
        raise UserError(
            f"Keras cannot be imported, because {file!r} has {' and '.join(wrong)}; remove the "
            "file, or correct it"
        )


def _note(text: str) -> None:
    if sys.stderr is not None:  # it is None if the process started with a closed standard error
        print(f"note: {text}, which is used", file=sys.stderr)


def _log_file() -> IO[bytes]:
    """Returns a nameless file; in memory if no folder for temporary files can be written."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.memfd_create("log"), "w+b")


def import_tensorflow() -> None:
    """Imports TensorFlow and lists its devices, without the lines that it logs.

    Its C++ code prints some lines before logging is initialised, so that no setting hides them.
    Standard error is therefore redirected to a file. The file is printed if the import fails, or if
    there is an NVIDIA driver but no GPU is found.

    Raises:
      UserError: the configuration file of Keras is not valid.
    """
    prepare()
    os.environ["MPLBACKEND"] = "agg"  # in programs, not in a notebook that imports this package
    check_keras_file()
    is_first = "tensorflow" not in sys.modules
    with _quick_imports():
        _import_without_log()
    if is_first:
        gc.freeze()  # the collector leaves out these objects until an epoch has ended


@contextlib.contextmanager
def _quick_imports() -> Iterator[None]:
    """Makes the import of TensorFlow and Keras in this block take two thirds of the time.

    Python's garbage collector would search all new objects several times, and find almost nothing
    to free. Keras would import scikit-learn, for wrappers of `fit`, and Matplotlib, for pictures of
    its own. Both can still be imported later.
    """
    hidden = {"sklearn", "matplotlib"} - sys.modules.keys()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be found
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
        if was_enabled:
            gc.enable()


def _import_without_log() -> None:
    if os.environ.get("TF_XLA_FLAGS"):  # an unknown flag ends the process, with a message
        importlib.import_module("keras")
        importlib.import_module("tensorflow").config.list_physical_devices()
        return
    sys.stderr.flush()
    standard_error = os.dup(2)
    with _log_file() as log, at_once(standard_error):
        os.dup2(log.fileno(), 2)
        failed = True
        try:
            import keras  # noqa: F401 (TensorFlow would import it later)
            import tensorflow as tf

            gpus = tf.config.list_physical_devices("GPU")
            failed = not gpus and os.path.exists("/proc/driver/nvidia/version")
        finally:
            os.dup2(standard_error, 2)
            os.close(standard_error)
            if failed:
                log.seek(0)
                os.write(2, log.read())
