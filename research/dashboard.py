"""What TensorBoard is told of a run besides its figures: settings to compare by, and a layout."""

from __future__ import annotations

from typing import Any

from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalar
from tensorboard.plugins.hparams import api as hparams
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import summary as hparams_summary

# Where a run is in TensorBoard says nothing about how it was trained.
NOT_COMPARED = ("ckpt_dir", "data_dir", "cache_dir", "find_learning_rate")
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


def settings_to_compare(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns a run's settings as TensorBoard's HParams dashboard takes them."""
    return {
        name: "none" if value is None else value
        for name, value in settings.items()
        if name not in NOT_COMPARED
    }


def figures_to_compare() -> list[hparams.Metric]:
    """Returns the figures by which that dashboard compares runs, below the run's own folder."""
    places = {"validation": "validation", "test": "evaluation_test"}
    return [
        hparams.Metric(figure, group=group, display_name=f"{split} {figure}")
        for split, group in places.items()
        for figure in ("accuracy", "loss")
    ]


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
