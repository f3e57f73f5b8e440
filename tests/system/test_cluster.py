from __future__ import annotations

import json

import pytest

from research.system.cluster import Cluster, find_cluster
from research.system.errors import UserError

TWO = {"worker": ["a:1", "b:2"]}


def config(cluster, kind="worker", index=0) -> str:
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})


def test_the_first_worker_is_the_chief(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config(TWO, index=1))
    cluster = find_cluster("auto")
    assert cluster == Cluster(("a:1", "b:2"), 1) == find_cluster("multi_worker")
    assert not cluster.is_chief
    assert str(cluster) == "worker 1 of 2, worker 0 keeps the records"


def test_a_named_chief_is_the_first_worker(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config({"chief": ["c:3"], **TWO}, index=0))
    assert find_cluster("auto") == Cluster(("c:3", "a:1", "b:2"), 1)
    monkeypatch.setenv("TF_CONFIG", config({"chief": ["c:3"], **TWO}, kind="chief"))
    assert find_cluster("auto").is_chief


@pytest.mark.parametrize("distribution", ["none", "mirrored"])
def test_other_distributions_ignore_tf_config(monkeypatch, distribution):
    monkeypatch.setenv("TF_CONFIG", "not even JSON")
    assert find_cluster(distribution) is None


@pytest.mark.parametrize("distribution", ["auto", "multi_worker"])
def test_one_worker_is_no_cluster(monkeypatch, capsys, distribution):
    monkeypatch.setenv("TF_CONFIG", config({"chief": ["host.invalid:2222"]}, "chief"))
    assert find_cluster(distribution) is None
    assert capsys.readouterr().err == (
        "note: TF_CONFIG names one worker; training without others\n"
    )


def test_auto_without_tf_config_has_no_workers(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert find_cluster("auto") is None
    with pytest.raises(UserError, match="TF_CONFIG is not set; expected for example"):
        find_cluster("multi_worker")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "list"),
        ("3", "int"),
        ("{}", "has no 'cluster'"),
        (json.dumps({"cluster": TWO}), "has no 'task'"),
        (config({}), "missing or given twice"),
        (config({"worker": ["a:1", "a:1"]}), "missing or given twice"),
        (config({"worker": ["a"]}), "'a' is not host:port"),
        (config({"worker": ["a:99999"]}), "'a:99999' is not host:port"),
        (config({"worker": [1]}), "1 is not host:port"),
        (config({"worker": "a:1"}), "is not host:port"),
        (config(TWO, index=2), "no task 2 of type 'worker'"),
        (config(TWO, index=-1), "no task -1"),
        (config(TWO, index="x"), "invalid literal"),
        (config(TWO, kind="chief"), "no task 0 of type 'chief'"),
        (config({**TWO, "ps": ["c:3"]}), "type 'ps' are not supported"),
    ],
)
def test_an_invalid_tf_config_is_refused_with_the_reason_and_an_example(monkeypatch, text, reason):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError) as caught:
        find_cluster("auto")
    line = str(caught.value)
    assert reason in line
    assert line.startswith(f"TF_CONFIG is {text[:20]!r}"[:25])
    assert "host0:2222" in line
    assert "\n" not in line
