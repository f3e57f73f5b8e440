"""Every flag of every program with valid and invalid values; see `fuzzing/bad_flags.py`."""

from __future__ import annotations

import dataclasses

import pytest

from flags.command_line import parse_config
from research.settings.train_config import TrainConfig
from research.system.errors import UserError
from research.system.printable import printable
from research.train import train
from tests.fuzzing.bad_flags import Trial, ViolationError, check_refusal, outcome_of
from tests.fuzzing.flag_cases import PROGRAMS, Program
from tests.helpers import SMALL_RUN


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.script)
def test_every_flag_with_drawn_values(program, tmp_path):
    trial = Trial(tmp_path)
    for name in program.flags:
        trial.draw(program, name, 4)
    trial.draw(program, None, 30)
    trial.as_processes(2)
    assert trial.counts[program.script]["refused"] >= len(program.flags)


def test_an_uncaught_error_is_a_violation(tmp_path, monkeypatch):
    """A config class that raises an error other than a `UserError` is detected."""

    @dataclasses.dataclass(frozen=True)
    class Careless(TrainConfig):
        def __post_init__(self) -> None:
            1 // self.epochs

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ViolationError, match="ZeroDivisionError"):
        outcome_of(Program("run_train.py", Careless), ["--epochs=0"])


@pytest.mark.parametrize("message", ["", "Traceback\nValueError\n", "run_train.py: a\x1b[31m\n"])
def test_a_refusal_that_is_not_one_printable_line_is_a_violation(message):
    with pytest.raises(ViolationError):
        check_refusal(PROGRAMS[0], [], 2, message)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat 猫.jpg", "cat 猫.jpg"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\u2028", "a\\nb\\u2028"),
        ("caf\udce9", "caf\\xe9"),
        ("\u202egpj", "\\u202egpj"),
        ("no\u00a0break", "no\u00a0break"),
    ],
)
def test_control_characters_are_escaped(text, expected):
    assert printable(text) == expected
    assert printable(expected) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--epochs=0x" + "f" * 5000,), "of at most 2147483647"),
        (("--head_learning_rate=1e999",), "head_learning_rate is inf"),
        (("--stderrthreshold=loud",), "stderrthreshold must be one of"),
        (("--logger_levels=x:loud",), "Unknown level"),
        (("--ckpt_dir=" + "x" * 100_000, "--epochs=-1"), "epochs is -1"),
        (("--epochs=\x1b[31m",), "--epochs=\\x1b[31m"),
    ],
)
def test_command_lines_that_once_failed(flags, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = outcome_of(PROGRAMS[0], flags)
    assert outcome.kind == "refused"
    assert expected in outcome.line
    assert len(outcome.line) < 2100


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        ("run_train.py", "--gradual_unfreezing=1 --bn_mode=train", "give --bn_mode=frozen"),
        ("run_train.py", "--recompute=blocks --bn_mode=sync", "give --bn_mode=frozen"),
        ("run_train.py", "--hyperrule --steps_per_epoch=3", "hyperrule chooses --steps_per_epoch"),
        (
            "run_train.py",
            "--hyperrule --epochs=3 --mixup=1",
            "leave out these flags, or --hyper",
        ),
        ("run_train.py", "--hyperrule --trunk_cache=memory", "give --trunk_cache=auto"),
        ("run_train.py", "--epochs=0 --head_epochs=0", "at least one epoch"),
        ("run_train.py", "--image_size=4096 --evaluation_scale=2", "expected 32 to 4096"),
        ("run_train.py", "--backbone=InceptionV3 --image_size=32", "expected at least 75"),
        ("run_eval.py", "--ckpt_dir=a --dataset=b --image_folder=c", "expected only one of them"),
        ("run_eval.py", "--ckpt_dir=a --ckpt_dir=b --watch", "expected one --ckpt_dir"),
        ("run_eval.py", "--ckpt_dir=a --split=b --split=c --predictions=d", "expected one"),
        ("run_predict.py", "--checkpoint=best", "expected --ckpt_dir=DIR"),
    ],
)
def test_flags_that_contradict_each_other(script, flags, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (program,) = (one for one in PROGRAMS if one.script == script)
    for arguments in (flags.split(), flags.split()[::-1]):
        assert expected in outcome_of(program, arguments).line


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"--ckpt_dir=caf\xe9\n", "not UTF-8 text"), (None, "circular flagfile dependency")],
)
def test_flagfiles_that_cannot_be_read(content, expected, tmp_path, monkeypatch):
    empty, file = tmp_path / "empty", tmp_path / "some.flags"
    empty.mkdir()
    file.write_bytes(content or f"--flagfile={file}\n".encode())
    monkeypatch.chdir(empty)
    assert expected in outcome_of(PROGRAMS[0], [f"--flagfile={file}"]).line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--unfreeze_from=-1",), "expected 0 to 28"),
        (("--unfreeze_from=" + "9" * 30,), "expected 0 to 28"),
        (("--profile_steps=999:9999",), "but the run has"),
        (("--weights=/dev/zero",), "not a regular file"),
        (("--weights=/",), "a folder"),
        (("--ckpt_dir=/dev/null",), "cannot be written"),
        (("--trunk_cache=disk", "--cache_dir=/dev/null"), "cannot be written"),
        (("--dataset=huggingface:mnist",), "expected the name of a TFDS data set"),
        (("--dataset=mnist/data_dir=elsewhere",), "expected the name of a TFDS data set"),
        (("--dataset=../../etc",), "expected the name of a TFDS data set"),
    ],
)
def test_errors_found_after_the_start_are_one_line_too(
    flags, expected, photo_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if not flags[0].startswith("--dataset"):
        flags = (f"--image_folder={photo_folder}", *flags)
    with pytest.raises(UserError) as caught:
        train(parse_config(TrainConfig, [*SMALL_RUN, *flags]))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
