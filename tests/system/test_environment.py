from __future__ import annotations

import os

import pytest

from research.system import environment


@pytest.mark.parametrize("name", ["TF_ENABLE_ONEDNN_OPTS", "TF_NUM_INTRAOP_THREADS"])
def test_variables_of_the_user_are_kept(monkeypatch, name):
    monkeypatch.setenv(name, "7")
    environment.prepare()
    assert os.environ[name] == "7"


def test_onednn_is_enabled_and_threads_match_the_processors(monkeypatch):
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    monkeypatch.setattr(environment, "processors", lambda: 3)
    environment.prepare()
    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == "1"
    assert os.environ["TF_NUM_INTRAOP_THREADS"] == "3"
