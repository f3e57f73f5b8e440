"""Photos that the tests draw for themselves, and the logical devices that they share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from research.process.environment import import_tensorflow

import_tensorflow()

import tensorflow as tf  # noqa: E402

from research import runtime  # noqa: E402
from tests.helpers import draw_photos  # noqa: E402

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 drawn cats and 40 drawn dogs."""
    return draw_photos(tmp_path_factory.mktemp("photos"), 40)


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """Trained runs are restored on the first of the logical devices, which is quicker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "make_strategy", lambda distribution: tf.distribute.get_strategy())
        yield
