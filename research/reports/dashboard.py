"""What TensorBoard is told of a run besides its figures: settings to compare by, and a layout."""

from __future__ import annotations

import dataclasses

from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import summary as hparams_summary

from research.config import TrainConfig
from research.settings import setting_of

CHARTS = {
    "Learning": {
        "loss": [r"^loss$"],
        "accuracy": [r"^accuracy$"],
    },
    "Optimizers": {
        "learning rate": [r"^learning_rate/"],
        "norm of the gradient": [r"^gradient_norm/"],
    },
    "Speed": {
        "photos a second": [r"^photos_per_second$"],
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
    return {name: "none" if value is None else value for name, value in values.items()}


def finished() -> bytes:
    """Returns the summary that tells that dashboard of a run's end."""
    summary = hparams_summary.session_end_pb(api_pb2.STATUS_SUCCESS)
    return summary.SerializeToString()


def layout() -> bytes:
    """Returns the summary that groups the figures in the dashboard of custom scalars."""
    categories = [
        layout_pb2.Category(
            title=category,
            chart=[
                layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags))
                for title, tags in charts.items()
            ],
        )
        for category, charts in CHARTS.items()
    ]
    return custom_scalar.pb(layout_pb2.Layout(category=categories)).SerializeToString()
