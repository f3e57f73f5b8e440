"""Two processes on the loopback interface stand for two hosts. They share no run folder."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import tensorflow as tf

from research.system.slurm import read_step
from tests.helpers import (
    SMALL_RUN,
    Started,
    draw_photos,
    free_ports,
    read_checkpoint,
    read_metrics,
    run_script,
    signal_at,
)
from tests.launcher import ROOT

# 66 photos in batches of 8: the last batch has 2 photos, so that a device may have none.
FLAGS = (
    *SMALL_RUN,
    "--head_epochs=1",  # from features; the other epoch from activations
    "--epochs=1",
    "--checkpoint_every=3",
    "--trunk_cache=disk",
    "--photo_cache=disk",
    "--cache_dir=../cache",  # shared by both workers
    "--bn_mode=sync",
    "--clip_norm=1",
    "--weight_decay=0.01",
    "--head_optimizer=adam",
    "--backbone_optimizer=sgd",
    "--backbone_learning_rate=0.01",
    "--horizontal_flip=auto",
    "--evaluation_scale=auto",
    "--weight_averaging=0.9",
    "--mirror_averaging",
    "--class_weights=balanced",
    "--deterministic",
    "--ckpt_dir=run",
)


TRAIN_STEPS = "research.loop.learner:Learner.train_steps"
WRITE_RESULT = "research.runs.run_directory:RunDirectory.write_result"


class Workers:
    """Starts the workers of a run; the context manager kills those still running at its end.

    Args:
      folder: contains the working directory of each worker.
      flags: of each worker.
      signals: by worker index, a function, the number of one of its calls, and the signal that the
        worker receives at the end of this call.
      environments: the variables that name the workers to each; None sets `TF_CONFIG`.
    """

    def __init__(
        self,
        folder: Path,
        flags: Sequence[Sequence[str]],
        signals: Mapping[int, tuple[str | int, ...]] = MappingProxyType({}),
        environments: Sequence[Mapping[str, str]] | None = None,
    ) -> None:
        environments = environments or tf_configs()
        self.processes = []
        for index, own in enumerate(flags):
            host = folder / f"host{index}"
            host.mkdir(exist_ok=True, parents=True)
            script = "run_train.py"
            if index in signals:
                own = [signal_at(script, *signals[index]), *own]
                script = "tests/signalled.py"
            self.processes.append(Started(host, script, own, environments[index]))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.__exit__()

    def wait(self, index: int, seconds: float = 240) -> tuple[int, str, str]:
        """Returns a worker's exit code, standard output and standard error."""
        return self.processes[index].end(seconds)


def tf_configs(count: int = 2) -> list[dict[str, str]]:
    """Returns the environment of each worker of a run, on free ports."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(count)]}
    return [
        {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})}
        for index in range(count)
    ]


def slurm_tasks(job: int, step: int) -> list[dict[str, str]]:
    """Returns what `srun` sets for each of two tasks on this host."""
    return [
        {
            "SLURM_JOB_ID": str(job),
            "SLURM_STEP_ID": str(step),
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_PROCID": str(rank),
            "SLURM_NODEID": "0",
            "SLURM_LOCALID": str(rank),
        }
        for rank in range(2)
    ]


def free_job(steps: int) -> int:
    """Returns the number of a Slurm job whose steps have free ports on this machine."""
    for job in itertools.count(random.randrange(1000)):
        steps_of_job = [read_step(slurm_tasks(job, step)[0]) for step in range(steps)]
        addresses = [address for step in steps_of_job for address in step.addresses]
        try:
            for address in addresses:
                socket.create_server(("", int(address.rpartition(":")[2]))).close()
        except OSError:
            continue
        return job
    raise AssertionError


class SlurmJob:
    """The script examples/slurm.sh, with a `srun` and a `scontrol` that this test answers for.

    Both print their command line on standard output. `srun` then reads its exit code. The context
    manager ends the script.
    """

    def __init__(self, folder: Path, number: int) -> None:
        programs = folder / "programs"
        programs.mkdir(parents=True, exist_ok=True)
        answers = {"srun": 'read -r code; exit "$code"', "scontrol": "exit 0"}
        for name, answer in answers.items():
            (programs / name).write_text(f'#!/bin/bash\necho "{name} $*"\n{answer}\n')
            (programs / name).chmod(0o755)
        (folder / "examples").unlink(missing_ok=True)
        (folder / "examples").symlink_to(ROOT / "examples")
        self._process = subprocess.Popen(
            ["bash", str(ROOT / "examples" / "slurm.sh")],
            cwd=folder,
            env={
                "PATH": f"{programs}:{os.environ['PATH']}",
                "SLURM_JOB_ID": str(number),
                "SLURM_CPUS_PER_TASK": "3",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> SlurmJob:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)  # closes the standard input that `srun` reads

    def command(self) -> str:
        """Returns the next command line of `srun` or `scontrol`."""
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def answer(self, codes: Sequence[int]) -> None:
        """Ends `srun` as Slurm does: with the highest exit code of its tasks."""
        assert self._process.stdin
        self._process.stdin.write(f"{max(128 - code if code < 0 else code for code in codes)}\n")
        self._process.stdin.flush()

    def end(self) -> int:
        """Returns the exit code of the script."""
        return self._process.wait(60)


def train_together(
    folder: Path, flags: Sequence[str], environments: Sequence[Mapping[str, str]] | None = None
) -> list[str]:
    """Trains to the end and returns the standard output of each worker."""
    environments = environments or tf_configs()
    count = len(environments)
    with Workers(folder, [flags] * count, environments=environments) as workers:
        results = [workers.wait(index) for index in range(count)]
    for code, _, error in results:
        assert code == 0, error
    return [out for _, out, _ in results]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("photos"), 41)


@pytest.fixture(scope="module")
def together(photos, tmp_path_factory):
    """A folder with a run of two workers, and their standard output."""
    folder = tmp_path_factory.mktemp("together")
    return folder, train_together(folder, [*FLAGS, f"--image_folder={photos}"])


def assert_same(run: Path, other: Path) -> None:
    expected, found = read_checkpoint(run), read_checkpoint(other)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_two_workers_train_like_one(together, photos, tmp_path):
    folder, _ = together
    process = run_script(tmp_path, "run_train.py", *FLAGS, f"--image_folder={photos}")
    assert process.returncode == 0, process.stderr
    rows = read_metrics(tmp_path / "run")
    trained = json.loads((tmp_path / "run" / "data.json").read_text())["train_photos"]
    assert trained % 8 in range(1, 8)  # the last batch is uneven
    for one, two in zip(rows, read_metrics(folder / "host0" / "run"), strict=True):
        for key in ("step", "train_accuracy", "validation_accuracy"):
            assert one[key] == two[key]
        for key in ("train_loss", "validation_loss"):
            assert one[key] == pytest.approx(two[key], rel=1e-4)
    one, two = read_checkpoint(tmp_path / "run"), read_checkpoint(folder / "host0" / "run")
    for name, value in one.items():
        if value.dtype.kind == "f" and "seconds" not in name:
            np.testing.assert_allclose(two[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_only_the_chief_keeps_records(together):
    folder, (chief, other) = together
    assert "worker 0 of 2, the chief" in chief
    assert "worker 1 of 2, worker 0 keeps the records" in other
    assert "2 CPU" in chief
    assert "trunk cache  features on disk" in chief
    assert "trunk cache  activations on disk" in chief
    assert "evaluate:     python run_eval.py" in chief
    assert "evaluate:" not in other
    assert list((folder / "host1").iterdir()) == []
    kept = {path.name for path in (folder / "host0" / "run").iterdir()}
    assert {"checkpoints", "events", "metrics.jsonl", "pictures"} <= kept


def test_a_run_of_two_workers_is_evaluated_on_one_machine(together, photos):
    folder, _ = together
    flags = ["--ckpt_dir=run", "--split=validation", "--checkpoint=best", "--nopictures"]
    process = run_script(folder / "host0", "run_eval.py", *flags)
    assert process.returncode == 0, process.stderr
    (figures,) = (folder / "host0" / "run" / "checkpoints" / "best").glob("*.validation.json")
    best = min(row["validation_loss"] for row in read_metrics(folder / "host0" / "run"))
    assert json.loads(figures.read_text())["loss"]["value"] == pytest.approx(best, rel=1e-4)


def assert_lost(worker: int, end: tuple[int, str, str]) -> None:
    """Asserts that a worker ended with one line because the other one was lost."""
    code, _, error = end
    assert code == 75, error
    line = error.splitlines()[-1]
    assert line.startswith(f"run_train.py: this is worker {worker} of 2")
    assert "another worker ended or does not answer" in line
    assert "start all workers again with the same flags to resume" in line
    assert "Traceback" not in error


def test_workers_that_die_or_are_stopped_resume_from_the_chiefs_checkpoint(
    together, photos, tmp_path
):
    """The run is bit-identical after each worker was killed once and one was stopped.

    It is started by the script for Slurm, which starts both workers again after a kill, and
    requeues the job after SIGTERM, which Slurm sends before the end of the time.
    """
    number = free_job(steps=2)
    flags = [*FLAGS, f"--image_folder={photos}"]
    run = tmp_path / "host0" / "run"

    def saved() -> int:
        path = tf.train.latest_checkpoint(str(run / "checkpoints" / "latest"))
        return int(path.rpartition("-")[2])

    def ends(step: int, worker: int, *signal_of_worker: str | int) -> list[tuple[int, str, str]]:
        signals, tasks = {worker: signal_of_worker}, slurm_tasks(number, step)
        with Workers(tmp_path, [flags, flags], signals, tasks) as workers:
            results = [workers.wait(index, 90) for index in range(2)]
        job.answer([code for code, _, _ in results])
        return results

    with SlurmJob(tmp_path / "job", number) as job:
        command = job.command()
        assert command.startswith("srun --kill-on-bad-exit=0 --cpus-per-task=3 python run_train.py")
        chief, other = ends(0, 1, TRAIN_STEPS, 2, signal.SIGKILL)
        assert other[0] == -signal.SIGKILL, other
        assert_lost(0, chief)
        killed_at = saved()

        assert job.command() == command
        (code, out, error), (other_code, _, other_error) = ends(
            1, 1, TRAIN_STEPS, 1, signal.SIGTERM
        )
        assert (code, other_code) == (143, 143)
        assert f"resuming after step {killed_at} of 18" in out
        assert re.search(r"by SIGTERM; step \d+ of 18 is saved: repeat the command with", error)
        assert re.search(r"by SIGTERM; the chief saved step \d+: start all workers a", other_error)
        stopped_at = saved()
        assert 0 < killed_at < stopped_at < 18
        assert job.command() == f"scontrol requeue {number}"
        assert job.end() == 143
    shutil.copytree(run, tmp_path / "alone" / "run")

    with SlurmJob(tmp_path / "job", number) as job:
        assert job.command() == command
        chief, other = ends(0, 0, WRITE_RESULT, 1, signal.SIGKILL)
        assert f"resuming after step {stopped_at} of 18" in chief[1]
        assert chief[0] == -signal.SIGKILL, chief
        assert_lost(1, other)  # although it has nothing to do after the last step

        assert job.command() == command
        train_together(tmp_path, flags, slurm_tasks(number, 1))
        job.answer([0, 0])
        assert job.end() == 0
    assert_same(together[0] / "host0" / "run", run)

    alone = run_script(tmp_path / "alone", "run_train.py", *flags)  # one worker can resume
    assert alone.returncode == 0, alone.stderr
    assert f"resuming after step {stopped_at} of 18" in alone.stdout
    expected, found = read_metrics(run)[-1], read_metrics(tmp_path / "alone" / "run")[-1]
    for key in ("train_loss", "validation_loss"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4)


def test_a_missing_worker_is_waited_for_until_the_timeout(photos, tmp_path):
    flags = [*FLAGS, f"--image_folder={photos}", "--worker_timeout=3"]
    with Workers(tmp_path, [flags]) as workers:
        code, _, error = workers.wait(0, 90)
    assert code != 0
    note, line = error.splitlines()[-2:]
    assert re.fullmatch(
        r"note: this is worker 0 of 2, the chief; waiting for 127.0.0.1:\d+, at most 3 s", note
    )
    assert "connected within 3 s; start every worker" in line
    assert "--worker_timeout" in line
    assert not (tmp_path / "host0" / "run").exists()


def test_workers_with_other_settings_are_refused(photos, tmp_path):
    flags = [*FLAGS, f"--image_folder={photos}"]
    with Workers(tmp_path, [flags, [*flags, "--batch_size=16"]]) as workers:
        code, _, error = workers.wait(1, 90)
        assert code == 2, error
        assert "batch_size is 8 on the chief and 16 on this worker" in error.splitlines()[-1]
        code, _, error = workers.wait(0, 90)
        assert code == 75, error
        assert "another worker ended or does not answer" in error.splitlines()[-1]
    assert not (tmp_path / "host0" / "run").exists()


def test_workers_with_other_photos_are_refused(photos, tmp_path):
    others = draw_photos(tmp_path, 30)
    flags = [[*FLAGS, f"--image_folder={folder}"] for folder in (photos, others)]
    with Workers(tmp_path, flags) as workers:
        code, _, error = workers.wait(1, 90)
    assert code == 2
    line = error.splitlines()[-1]
    assert "have different photos: train_photos is 66 on the chief and" in line


def test_unsupported_settings_of_several_workers_are_one_line(tmp_path):
    """Without TF_CONFIG, or with logical devices; no file is written."""
    config = json.dumps(
        {
            "cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]},
            "task": {"type": "worker", "index": 0},
        }
    )
    for flag, environment, expected in (
        ("--distribution=multi_worker", "", "TF_CONFIG is not set"),
        ("--virtual_devices=2", config, "virtual_devices is 2, but a worker of several"),
    ):
        flags = [*SMALL_RUN, "--dataset=sketches", flag]
        with Started(tmp_path, "run_train.py", flags, {"TF_CONFIG": environment}) as process:
            code, _, error = process.end(120)
        assert code == 2
        (line,) = error.splitlines()
        assert expected in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("workers", "flags", "reason"),
    [
        (
            2,
            ("--unfreeze_from=none", "--epochs=3", "--trunk_cache=memory", "--profile_steps=2:3"),
            "features in memory",
        ),
        (4, ("--head_epochs=1", "--epochs=1", "--trunk_cache=off", "--horizontal_flip"), "off"),
    ],
)
def test_workers_that_decode_their_own_photos_train_like_one(
    photos, tmp_path, workers, flags, reason
):
    flags = [*SMALL_RUN, f"--image_folder={photos}", *flags, "--ckpt_dir=run"]
    # Only the workers decode photos when they need them.
    outputs = train_together(tmp_path, [*flags, "--photo_cache=none"], tf_configs(workers))
    assert all(f"{workers} CPU" in output for output in outputs)
    assert all(f"trunk cache  {reason}" in output for output in outputs)
    assert run_script(tmp_path, "run_train.py", *flags).returncode == 0
    pairs = zip(
        read_metrics(tmp_path / "host0" / "run"), read_metrics(tmp_path / "run"), strict=True
    )
    for one, two in pairs:
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)
        assert one["validation_loss"] == pytest.approx(two["validation_loss"], rel=1e-4)


def run_with_addresses(folder, *addresses: str, flags=()) -> tuple[int, str, str]:
    """Runs worker 0 of these."""
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": 0}}
    environment = {"TF_CONFIG": json.dumps(config)}
    with Started(folder, "run_train.py", [*SMALL_RUN, *flags], environment) as process:
        return process.end(120)


def test_a_cluster_of_one_worker_needs_no_cluster(photos, tmp_path):
    """Its address, of another job, does not matter."""
    flags = [f"--image_folder={photos}", "--unfreeze_from=none", "--epochs=1", "--ckpt_dir=run"]
    flags += ["--distribution=multi_worker", "--virtual_devices=2"]
    code, out, error = run_with_addresses(tmp_path, "host.invalid:2222", flags=flags)
    assert code == 0, error
    assert error == "note: TF_CONFIG names one worker; training without others\n"
    assert "2 CPU" in out


def test_a_host_that_is_not_known_is_told_at_once_and_ends_the_run(tmp_path):
    flags = ["--dataset=sketches", "--worker_timeout=1", "--ckpt_dir=run"]
    code, _, error = run_with_addresses(
        tmp_path, f"127.0.0.1:{free_ports(1)[0]}", "host.invalid:1", flags=flags
    )
    assert code == 75
    note, line = error.splitlines()
    assert note.startswith("note: this is worker 0 of 2, the chief; the host of host.invalid:1 is")
    assert note.endswith("; waiting for it")
    assert "the host of host.invalid:1 is not known (" in line
    assert "correct TF_CONFIG, or give --distribution=none" in line
    assert not (tmp_path / "run").exists()
