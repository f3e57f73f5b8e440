"""What must be settled before TensorFlow is imported; this module does not import it."""

from __future__ import annotations

import os
import sys
import tempfile

from research.system.interruption import at_once
from research.system.machine import processors


def prepare() -> None:
    """Sets what TensorFlow reads from the environment once, at import. What the user set stays.

    oneDNN is off by default on CPUs without AVX-512, where it makes a train step about three
    times faster. Level 2 hides TensorFlow's information and warnings, not its errors. In a
    container that is held to a few processors TensorFlow would start a thread for each of the host.
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(processors()))


def import_tensorflow() -> None:
    """Imports TensorFlow and lets it look for devices, without the lines that tells of.

    Some come from C++ before logging is initialised, so that no setting hides them: standard error
    itself is set aside. It is shown after all where something is wrong: the import fails, or an
    NVIDIA driver is there and no GPU is found.
    """
    prepare()
    sys.stderr.flush()
    standard_error = os.dup(2)
    with tempfile.TemporaryFile() as aside, at_once(standard_error):
        os.dup2(aside.fileno(), 2)
        wrong = True
        try:
            import tensorflow as tf

            gpus = tf.config.list_physical_devices("GPU")
            wrong = not gpus and os.path.exists("/proc/driver/nvidia/version")
        finally:
            os.dup2(standard_error, 2)
            os.close(standard_error)
            if wrong:
                aside.seek(0)
                os.write(2, aside.read())
