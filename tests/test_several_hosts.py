"""The files and commands of docs/several_hosts.md, without training."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from flags.command_line import parse_config
from research.settings.train_config import TrainConfig
from research.system.cluster import Cluster, find_cluster
from research.system.errors import UserError, WorkerLostError
from tests.launcher import ROOT

RESTART = ROOT / "examples" / "restart.sh"
DOCUMENT = ROOT / "docs" / "several_hosts.md"


def restart(folder: Path, *ends: str) -> tuple[int, int, str]:
    """Runs a command that ends in these ways; returns exit code, number of starts and messages."""
    (folder / "ends").write_text("".join(f"{end}\n" for end in ends))
    program = folder / "program"
    program.write_text(
        'echo >>starts\nread -r end < <(sed -n "$(wc -l <starts)p" ends)\neval "$end"'
    )
    process = subprocess.run(
        ["bash", str(RESTART), "bash", str(program)], cwd=folder, capture_output=True, text=True
    )
    starts = (folder / "starts").read_text().count("\n")
    return process.returncode, starts, process.stderr


def test_a_command_is_started_again_after_a_kill_and_after_the_loss_of_a_host(tmp_path):
    lost = f"exit {WorkerLostError.exit_code}"
    code, starts, messages = restart(tmp_path, lost, "kill -KILL $$", lost, "exit 0")
    assert (code, starts) == (0, 4)
    assert "restart.sh: exit code 137; start 3 of at most 100" in messages


@pytest.mark.parametrize("code", [UserError.exit_code, 1, 130, 143])
def test_a_command_is_not_started_again_after_an_error_or_a_stop(tmp_path, code):
    assert restart(tmp_path, f"exit {code}", "exit 0")[:2] == (code, 1)


def test_a_command_is_started_at_most_100_times(tmp_path):
    command = ["bash", str(RESTART), "sh", "-c", "echo >>starts; exit 75"]
    assert subprocess.run(command, cwd=tmp_path, stderr=subprocess.DEVNULL).returncode == 75
    assert (tmp_path / "starts").read_text().count("\n") == 100


def flags_of(command: str) -> list[str]:
    return command.partition("run_train.py ")[2].split()


def test_the_commands_for_two_hosts_name_both(monkeypatch):
    pattern = r"export TF_CONFIG='(.*)'\n(bash examples/restart.sh python run_train.py .*)\n"
    commands = re.findall(pattern, DOCUMENT.read_text())
    for index, (config, command) in enumerate(commands):
        monkeypatch.setenv("TF_CONFIG", config)
        assert find_cluster("auto") == Cluster(("host0:2222", "host1:2222"), index)
        assert parse_config(TrainConfig, flags_of(command)).batch_size == 64
    assert len(commands) == 2
    assert len({command for _, command in commands}) == 1


def test_the_job_of_slurm_is_valid_for_bash_and_for_the_flags():
    script = ROOT / "examples" / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    lines = script.read_text().replace("\\\n", "").splitlines()
    (command,) = (line for line in lines if line.startswith("bash "))
    assert parse_config(TrainConfig, flags_of(command)).ckpt_dir.endswith("/runs/slurm")


def test_the_job_of_kubernetes_names_its_own_pods(monkeypatch):
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "examples" / "kubernetes.yaml").read_text()
    service, job = yaml.safe_load_all(text)
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None"  # headless: a name for each pod
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 2

    (container,) = pod["containers"]
    index, config = container["env"]  # a value may contain the variables before it
    for number in range(spec["completions"]):
        value = config["value"].replace(f"$({index['name']})", str(number))
        monkeypatch.setenv(config["name"], value)
        hosts = [f"{name}-{pod_index}.{pod['subdomain']}:2222" for pod_index in range(2)]
        assert find_cluster("auto") == Cluster(tuple(hosts), number)

    program, script, *flags = container["command"]
    assert (program, script) == ("python", "run_train.py")
    assert parse_config(TrainConfig, flags).ckpt_dir.startswith("/data/")
    ends, moves = spec["podFailurePolicy"]["rules"]
    assert ends["action"] == "FailJob"
    assert UserError.exit_code in ends["onExitCodes"]["values"]
    assert WorkerLostError.exit_code not in ends["onExitCodes"]["values"]
    assert moves["action"] == "Ignore"
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy requires this
