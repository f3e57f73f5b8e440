"""Photos that the tests draw for themselves, and the logical devices that they share."""

from __future__ import annotations

from pathlib import Path

import pytest

from research.environment import import_tensorflow

import_tensorflow()

import tensorflow as tf  # noqa: E402

from tests.helpers import draw_photos  # noqa: E402

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 drawn cats and 40 drawn dogs."""
    return draw_photos(tmp_path_factory.mktemp("photos"), 40)
