"""`run_predict.py`: one line per file, also for unusual and damaged files."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from research.data.built_in.sketches import sketch_jpeg
from research.data.folder.folder_source import FolderSource
from research.evaluation.classifier import Classifier
from research.evaluation.evaluate import evaluate
from research.serving import predict as predicting
from research.serving.answers import answers_of
from research.serving.predict import DamagedFile, StoredPhoto, find_files, predict, predict_files
from research.settings.program_configs import EvalConfig, PredictConfig
from research.system.errors import UserError
from tests.helpers import ROOT, launcher, make_run, run_script, script_environment

ODD = b"not\xffutf8\n, \"and\".jpg"  # fmt: skip


@pytest.fixture(scope="module")
def run(photo_folder, tmp_path_factory):
    return make_run(
        tmp_path_factory.mktemp("predicting") / "run", photo_folder, mirror_averaging=True
    )


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    """A folder tree with unusual file names, a damaged, an empty and a text file."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "deep" / "deeper" / "a.JPG").write_bytes(sketch_jpeg(0, 1))
    (folder / "deep" / "$b,c.jpg").write_bytes(sketch_jpeg(1, 2))
    Path(os.fsdecode(os.fsencode(folder) + b"/" + ODD)).write_bytes(sketch_jpeg(0, 3))
    (folder / "broken\n.png").write_bytes(b"no photo")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("none of them")
    return folder


def shown(capsys):
    captured = capsys.readouterr()
    return captured.out, captured.err.splitlines()


def test_the_same_probabilities_as_run_eval(one_device, run, photo_folder, tmp_path, capsys):
    file = tmp_path / "predictions.csv"
    evaluate(EvalConfig(ckpt_dir=(str(run),), predictions=str(file), pictures=False, resamples=0))
    evaluated = {row["file"]: row for row in csv.DictReader(file.read_text().splitlines())}
    names = [one.name for one in FolderSource(str(photo_folder)).examples("test")]
    shown(capsys)
    config = PredictConfig(ckpt_dir=str(run), format="csv")
    assert predict(config, [str(photo_folder / name) for name in names]) == 0
    out, errors = shown(capsys)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert errors == []
    assert [row["file"] for row in rows] == [str(photo_folder / name) for name in names]
    for name, row in zip(names, rows, strict=True):
        assert row["label"] == evaluated[name]["predicted"]
        dog = float(evaluated[name]["probability"])
        assert float(row["probability dog"]) == pytest.approx(dog, abs=1e-6)
        assert float(row["probability"]) == pytest.approx(max(dog, 1 - dog), abs=1e-6)


def test_damaged_files_are_skipped_and_the_exit_code_is_1(run, odd_folder):
    process = run_script(
        odd_folder, "run_predict.py", f"--ckpt_dir={run}", "--format=jsonl", "deep/$b,c.jpg", "."
    )
    assert process.returncode == 1, process.stderr
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    printed = ODD.decode("utf-8", "backslashreplace")
    assert [row["file"] for row in rows] == ["deep/$b,c.jpg", "deep/deeper/a.JPG", printed]
    for row in rows:
        assert set(row["probabilities"]) == {"cat", "dog"}
        assert row["probability"] == max(row["probabilities"].values())
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    assert process.stderr.splitlines() == [
        "broken\\n.png: not an image of a known format",
        "empty.jpg: empty file",
    ]


def test_unusual_names_in_csv_and_table(one_device, run, odd_folder, capsys):
    assert predict(PredictConfig(ckpt_dir=str(run), format="csv"), [str(odd_folder)]) == 2
    out, errors = shown(capsys)
    rows = list(csv.reader(io.StringIO(out)))
    assert rows[0] == ["file", "label", "probability", "probability cat", "probability dog"]
    assert rows[3][0] == f"{odd_folder}/" + ODD.decode("utf-8", "backslashreplace")
    assert len(errors) == 2
    assert predict(PredictConfig(ckpt_dir=str(run)), [str(odd_folder)]) == 2
    out, errors = shown(capsys)
    lines = out.splitlines()
    assert lines[0].split() == ["file", "label", "probability"]
    assert len(lines) == 4  # one line per file
    assert "not\\xffutf8\\n, " in lines[3]
    shares = [float(line.split()[-1]) for line in lines[1:]]
    assert shares == pytest.approx([float(row[2]) for row in rows[1:]], abs=5e-5)


def test_output_that_cannot_be_written_ends_the_program(run, photo_folder, tmp_path):
    """Its output is its only result."""
    flags = [str(ROOT / "run_predict.py"), f"--ckpt_dir={run}", str(photo_folder)]
    with open("/dev/full", "w") as full, open(tmp_path / "errors", "w+") as errors:
        program = launcher().start(flags, tmp_path, script_environment(tmp_path), full, errors)
        assert program.wait(120) == 2
    (line,) = (tmp_path / "errors").read_text().splitlines()
    assert line == "run_predict.py: standard output cannot be written (No space left on device)"


def test_many_files_are_processed_in_order_and_in_chunks(
    one_device, run, photo_folder, monkeypatch
):
    files = find_files([str(photo_folder)])
    missing = photo_folder / "gone.jpg"
    # Deleted after it was listed.
    files.insert(3, StoredPhoto(files[0].tree, str(missing), str(missing)))
    chunks = []
    load = predicting.load_split

    def counted(source, *arguments):
        chunks.append(source.count(""))
        return load(source, *arguments)

    monkeypatch.setattr(predicting, "load_split", counted)
    monkeypatch.setattr(predicting, "BATCHES_PER_CHUNK", 2)
    classifier = Classifier(str(run))
    said = predict_files(classifier, answers_of(classifier), files)
    first = next(said)
    assert chunks == [16]  # two batches; the next are read after their results
    assert first.file == files[0].name
    rest = list(said)
    assert [one.file for one in [first, *rest]] == [photo.name for photo in files]
    assert chunks == [16] * 5 + [1]
    assert rest[2] == DamagedFile(str(missing), "cannot be read: No such file or directory")
    shares = [one.probability for one in rest if not isinstance(one, DamagedFile)]
    assert len(set(np.round(shares, 6))) > 40  # the results differ between photos


def test_a_file_that_is_given_twice_is_listed_once(photo_folder):
    some = photo_folder / "cat" / "cat001.jpg"
    files = find_files([str(some), str(photo_folder / "cat"), str(some)])
    assert files[0].name == str(some)
    assert len(files) == len(set(files)) == 40


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([], "no path is given"),
        (["https://a.b/c.jpg"], "'https://a.b/c.jpg' is a URL; download the photo"),
        (["gone.jpg"], "'gone.jpg' does not exist"),
        (["."], "no image"),
    ],
)
def test_paths_without_photos_are_refused(tmp_path, monkeypatch, paths, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=expected):
        find_files(paths)


def test_an_error_is_one_line(tmp_path):
    process = run_script(tmp_path, "run_predict.py", "photo.jpg")
    assert process.returncode == 2
    assert process.stderr == (
        "run_predict.py: ckpt_dir is not given; expected --ckpt_dir=DIR of a training run\n"
    )
    assert process.stdout == ""


def test_a_file_whose_name_looks_like_a_flag_has_a_way_out(tmp_path):
    (tmp_path / "-dash.jpg").touch()
    process = run_script(tmp_path, "run_predict.py", "--ckpt_dir=run", "-dash.jpg")
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.endswith("flag 'dash.jpg'; for the file of this name, write ./-dash.jpg")
