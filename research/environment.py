"""What must be settled before TensorFlow is imported; this module does not import it."""

from __future__ import annotations

import os
import sys
import tempfile


def prepare() -> None:
    """Sets what TensorFlow reads from the environment once, at import. What the user set stays.

    oneDNN is off by default on CPUs without AVX-512, where it makes a train step about three
    times faster. Level 2 hides TensorFlow's information and warnings, not its errors.
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def import_tensorflow() -> None:
    """Imports TensorFlow without the lines its libraries write before they read a log level.

    They come from C++ before logging is initialised, so that no setting hides them: standard
    error itself is set aside, and shown after all if the import fails.
    """
    prepare()
    sys.stderr.flush()
    standard_error = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            import tensorflow
            import tensorflow.python.eager.context  # noqa: F401
        except BaseException:
            aside.seek(0)
            os.write(standard_error, aside.read())
            raise
        finally:
            os.dup2(standard_error, 2)
            os.close(standard_error)
