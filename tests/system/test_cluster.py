from __future__ import annotations

import json
import os
import socket

import pytest

from research.system.cluster import Cluster, check_port, find_cluster
from research.system.errors import UserError, WorkerLostError
from research.system.slurm import expand_hosts
from tests.helpers import free_ports

TWO = {"worker": ["a:1", "b:2"]}


def config(cluster, kind="worker", index=0) -> str:
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})


# What srun sets for the last of three tasks on host9 and host10.
SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "host[9-10]",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the variables of the machine that runs the tests."""
    for name in [*os.environ]:
        if name == "TF_CONFIG" or name.startswith("SLURM_"):
            monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


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


def test_auto_without_tf_config_has_no_workers():
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


def test_the_tasks_that_srun_starts_are_the_workers(monkeypatch, capsys):
    set_all(monkeypatch, SLURM)
    cluster = find_cluster("auto")
    port = 15000 + 16 * (31 * 1234 % 1000)
    assert cluster == Cluster((f"host9:{port}", f"host9:{port + 1}", f"host10:{port}"), 2)
    assert find_cluster("multi_worker") == cluster
    assert find_cluster("none") is find_cluster("mirrored") is None
    assert capsys.readouterr().err == ""
    set_all(monkeypatch, {"SLURM_PROCID": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"})
    assert find_cluster("auto") == Cluster(cluster.workers, 1)
    note = "note: Slurm started 2 tasks on this host; give each its own GPUs with srun --gpus-per-"
    assert capsys.readouterr().err.startswith(note)


def test_ports_differ_between_jobs_and_steps_and_stay_after_requeuing(monkeypatch):
    def ports(job: int, step: int) -> set[str]:
        set_all(monkeypatch, {**SLURM, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        return {address.rpartition(":")[2] for address in find_cluster("auto").workers}

    assert ports(7, 0) == ports(7, 0)
    all_ports = [ports(job, step) for job in range(7, 12) for step in range(3)]
    assert len(set.union(*all_ports)) == sum(map(len, all_ports))


def test_tf_config_overrules_slurm(monkeypatch):
    set_all(monkeypatch, {**SLURM, "TF_CONFIG": config(TWO, index=1)})
    assert find_cluster("auto") == Cluster(("a:1", "b:2"), 1)


@pytest.mark.parametrize(
    ("variables", "has_note"),
    [
        ({"SLURM_NTASKS": "1"}, False),  # a job of one task, without srun
        ({"SLURM_NTASKS": "4"}, True),  # the shell of salloc, or sbatch without srun
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, True),  # salloc's interactive step
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, False),  # srun --ntasks=1
        ({}, False),
    ],
)
def test_a_process_that_is_not_one_of_several_tasks_trains_alone(
    monkeypatch, capsys, variables, has_note
):
    set_all(monkeypatch, variables)
    assert find_cluster("auto") is None
    note = "note: the Slurm job has 4 tasks, but srun did not start this process in them; training "
    assert capsys.readouterr().err == (f"{note}without others\n" if has_note else "")


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"SLURM_STEP_NODELIST": "host[9"}, "'host[9' has an unknown form"),
        ({"SLURM_STEP_NODELIST": "host[9,]"}, "invalid literal"),
        ({"SLURM_STEP_NODELIST": "host9"}, "3 tasks on 1 hosts"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(y3)"}, "'2(y3)' have an unknown form"),
        ({"SLURM_PROCID": "3"}, "rank 3 of 3 tasks"),
        ({"SLURM_PROCID": "1"}, "not in blocks; give srun --distribution=block"),  # cyclic
        ({"SLURM_STEP_NUM_TASKS": "21", "SLURM_STEP_TASKS_PER_NODE": "2,19"}, "has 19 tasks"),
    ],
)
def test_invalid_variables_of_slurm_are_refused_with_the_reason(monkeypatch, variables, reason):
    set_all(monkeypatch, {**SLURM, **variables})
    with pytest.raises(UserError) as caught:
        find_cluster("auto")
    line = str(caught.value)
    assert reason in line
    assert line.startswith("the variables of Slurm do not name the workers (")
    assert line.endswith("; set TF_CONFIG, or give --distribution=none")


def test_a_missing_variable_of_slurm_is_named(monkeypatch):
    set_all(monkeypatch, {name: SLURM[name] for name in SLURM if name != "SLURM_STEP_NODELIST"})
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST is not set"):
        find_cluster("auto")


def test_host_lists_of_slurm_keep_their_order():
    assert expand_hosts("host9") == ["host9"]
    assert expand_hosts("a-[08-10,12],b.c") == ["a-08", "a-09", "a-10", "a-12", "b.c"]
    assert expand_hosts("r[1-2]n[01-02]-ib") == ["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib"]


def test_a_port_that_an_earlier_worker_holds_is_named():
    (port,) = free_ports(1)
    cluster = Cluster(("127.0.0.1:1", f"127.0.0.1:{port}"), 1)
    check_port(cluster)
    with socket.create_server(("", port)), pytest.raises(WorkerLostError) as caught:
        check_port(cluster)
    line = str(caught.value)
    assert line.startswith(f"this is worker 1 of 2, worker 0 keeps the records; its port {port} ")
    assert "(Address already in use); end the process that uses it, such as an earlier" in line
