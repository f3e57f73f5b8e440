"""Your own tracker: sends settings and metrics to MLflow, to the local file mlflow.db.

pip install -e '.[mlflow]'
Flag: --tracker=examples/mlflow_tracker.py:MlflowTracker
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlflow

from research.runs.tracker import Tracker

STORE = "sqlite:///mlflow.db"  # show it with: mlflow ui --backend-store-uri sqlite:///mlflow.db


class MlflowTracker(Tracker):
    """Creates one MLflow run per start of the program."""

    def begin(self, settings: Mapping[str, Any], folder: str) -> None:
        mlflow.set_tracking_uri(STORE)
        mlflow.start_run(run_name=folder)
        mlflow.log_params(settings)

    def interval(self, step: int, figures: Mapping[str, float]) -> None:
        mlflow.log_metrics({f"interval/{name}": value for name, value in figures.items()}, step)

    def epoch(self, row: Mapping[str, Any]) -> None:
        mlflow.log_metrics({name: float(value) for name, value in row.items()}, row["step"])

    def end(self, result: Mapping[str, Any]) -> None:
        mlflow.end_run()
