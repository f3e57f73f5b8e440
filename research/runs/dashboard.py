"""TensorBoard's dashboards of a run: the settings to compare runs by, and the layout of charts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import summary as hparams_summary

from research.settings.fields import setting_of
from research.settings.train_config import TrainConfig

CHARTS = {
    "Optimizers": {
        "learning rate": [r"^learning_rate/"],
        "norm of the gradient": [r"^gradient_norm/"],
    },
    "Speed": {
        "photos per second": [r"^photos_per_second$"],
        "share of the time spent waiting for input": [r"^share_of_step_waiting_for_input$"],
    },
}


def settings_to_compare(config: TrainConfig) -> dict[str, str | float | bool]:
    """Returns a run's settings as TensorBoard's HParams dashboard takes them.

    Those that change nothing of what is trained are left out, as are places on this machine.
    """
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if setting_of(field).changes_result and field.name != "data_dir"
    }
    return {name: _comparable(value) for name, value in values.items()}


def _comparable(value: Any) -> str | float | bool:
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return "none" if value is None else value


def finished() -> bytes:
    """Returns the summary that tells that dashboard of a run's end."""
    summary = hparams_summary.session_end_pb(api_pb2.STATUS_SUCCESS)
    return summary.SerializeToString()


def layout(figures: Iterable[str]) -> bytes:
    """Returns the summary that groups figures in the dashboard of custom scalars.

    Args:
      figures: the names of loss and metrics.
    """
    learning = {name: [f"^{re.escape(name)}$"] for name in figures}
    categories = [
        layout_pb2.Category(
            title=category,
            chart=[
                layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags))
                for title, tags in charts.items()
            ],
        )
        for category, charts in {"Learning": learning, **CHARTS}.items()
    ]
    return custom_scalar.pb(layout_pb2.Layout(category=categories)).SerializeToString()
