"""Prepares the environment before TensorFlow is imported. This module does not import it."""

from __future__ import annotations

import os
import sys
import tempfile

from research.system.interruption import at_once
from research.system.machine import processors


def prepare() -> None:
    """Sets the environment variables that TensorFlow reads at import, unless the user set them.

    oneDNN is off by default on CPUs without AVX-512, where it makes a train step about three
    times faster. Log level 2 hides TensorFlow's messages below errors. In a container with a
    processor quota, TensorFlow would start one thread per processor of the host.
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(processors()))


def import_tensorflow() -> None:
    """Imports TensorFlow and lists its devices, without the lines that it logs.

    Its C++ code prints some lines before logging is initialised, so that no setting hides them.
    Standard error is therefore redirected to a file. The file is printed if the import fails, or if
    there is an NVIDIA driver but no GPU is found.
    """
    prepare()
    sys.stderr.flush()
    standard_error = os.dup(2)
    with tempfile.TemporaryFile() as log, at_once(standard_error):
        os.dup2(log.fileno(), 2)
        failed = True
        try:
            import tensorflow as tf

            gpus = tf.config.list_physical_devices("GPU")
            failed = not gpus and os.path.exists("/proc/driver/nvidia/version")
        finally:
            os.dup2(standard_error, 2)
            os.close(standard_error)
            if failed:
                log.seek(0)
                os.write(2, log.read())
