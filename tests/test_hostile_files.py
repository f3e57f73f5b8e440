"""Files from someone else: damaged by accident, or made to do harm."""

from __future__ import annotations

import json
import os
import pickle
import platform
import shutil
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from research.data.cache_store import CacheStore
from research.data.open_source import open_source
from research.models.weights import load_weights
from research.runs.restore import find_checkpoint
from research.runs.run_directory import RunDirectory, write_atomically
from research.system.errors import UserError
from tests.fuzzing.fuzz_files import HARMLESS, SUBJECTS, fuzz, outcome_of
from tests.fuzzing.valid_files import CACHED, Reader, small_backbone

KERNEL = "layers/conv2d/vars/0"


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader()


@pytest.fixture(scope="module")
def valid(reader, tmp_path_factory) -> Path:
    """A folder with a valid file of each kind."""
    folder = tmp_path_factory.mktemp("valid")
    reader.write(folder)
    return folder


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_randomly_damaged_files(subject, reader, valid, tmp_path):
    (file,) = valid.glob(subject.file)
    correct = None if subject.name == "SavedModel" else reader.read(subject.reader, valid, file)

    def read(kind, folder, damaged):
        return outcome_of(reader, kind, folder, damaged, correct or []), 0

    counts, violations, _ = fuzz(subject, valid, 7, 1, read)
    assert violations == []
    assert set(counts) <= set(HARMLESS)


def refused(path: Path) -> str:
    """Returns the one-line error for weights that are refused."""
    with pytest.raises(UserError) as caught:
        load_weights(small_backbone(), str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def altered(valid: Path, folder: Path) -> Path:
    """Returns a copy of valid weights, to be changed."""
    path = folder / "altered.weights.h5"
    path.write_bytes((valid / "weights" / "small.weights.h5").read_bytes())
    return path


def replace_kernel(path: Path, shape: tuple[int, ...], **settings: object) -> None:
    with h5py.File(path, "a") as file:
        del file[KERNEL]
        file.create_dataset(KERNEL, shape, "f4", **settings)


def test_arrays_that_claim_terabytes_are_not_read(valid, tmp_path):
    path = altered(valid, tmp_path)
    replace_kernel(path, (2**20, 2**20), chunks=(1024, 1024))
    assert "the file has (1048576, 1048576)" in refused(path)


def test_chunks_far_larger_than_their_array_are_not_read(valid, tmp_path):
    path = altered(valid, tmp_path)
    settings = {"maxshape": (None,) * 4, "chunks": (512, 512, 512, 7), "compression": "gzip"}
    replace_kernel(path, (3, 3, 3, 8), **settings)
    assert "in chunks of (512, 512, 512, 7)" in refused(path)


def test_deeply_nested_groups_are_not_followed(valid, tmp_path):
    path = altered(valid, tmp_path)
    with h5py.File(path, "a") as file:
        group = file["layers"]
        for _ in range(200):
            group = group.create_group("g")
    assert "nested too deeply" in refused(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value, valid, tmp_path):
    path = altered(valid, tmp_path)
    with h5py.File(path, "a") as file:
        file[KERNEL][0, 0, 0, 0] = value
    assert f"/{KERNEL} contains a value that is not a finite float32" in refused(path)


def test_a_long_text_referenced_thousands_of_times_does_not_exhaust_memory(valid, tmp_path):
    path = altered(valid, tmp_path)
    with h5py.File(path, "a") as file:
        names = np.array([b"x"] * 3000, dtype=object)
        file.attrs.create("layer_names", names, dtype=h5py.special_dtype(vlen=bytes))
        text = b"y" * 2**20
        file.attrs.create("long", text, dtype=h5py.special_dtype(vlen=bytes))
    content = path.read_bytes()
    # Each name is a length and a reference to the heap: replace all by that of the long text.
    short = content.index(b"\x01\x00\x00\x00", content.index(b"layer_names"))
    long = content.index((2**20).to_bytes(4, "little"), content.index(b"long\0"))
    reference = content[long : long + 16]
    path.write_bytes(content[:short] + reference * 3000 + content[short + 16 * 3000 :])
    assert "cannot be read" in refused(path)


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_not_unpickled(tmp_path):
    harm = tmp_path / "harm"
    content = pickle.dumps(Payload(harm))
    for name in ("pickle.h5", "pickle.weights.h5", "pickle.keras"):
        (tmp_path / name).write_bytes(content)
        assert "is a Python pickle, as of torch.save" in refused(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "archive.keras", "w") as archive:
        archive.writestr("model.weights.h5", content)
    assert "cannot be read" in refused(tmp_path / "archive.keras")
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("model/data.pkl", content)
    assert "save_file(torch.load(FILE, weights_only=True)" in refused(tmp_path / "model.pth")
    assert not harm.exists()
    pickle.loads(content)  # unpickling does create the folder
    assert harm.exists()


def test_an_archives_config_is_not_used_and_its_other_files_are_not_extracted(valid, tmp_path):
    harm = tmp_path / "harm"
    layer = {
        "module": "os",
        "class_name": "mkdir",
        "registered_name": None,
        "config": {"path": str(harm)},
    }
    lambda_layer = {"module": "keras.layers", "class_name": "Lambda", "config": {"function": layer}}
    path = tmp_path / "classifier.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(valid / "weights" / "small.weights.h5", "model.weights.h5")
        archive.writestr("config.json", json.dumps({"layers": [layer, lambda_layer]}))
        for name in ("../../harm", f"{harm}", "assets/../../harm"):
            archive.writestr(name, "harm")
    before = sorted(tmp_path.rglob("*"))
    assert load_weights(small_backbone(), str(path)).loaded == 9
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("compression", "expected"),
    [
        (zipfile.ZIP_DEFLATED, "would grow from"),
        (zipfile.ZIP_BZIP2, "compressed in a way that Keras does not use"),
    ],
)
def test_archives_that_expand_to_a_huge_size(compression, expected, tmp_path):
    path = tmp_path / "bomb.keras"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model.weights.h5", bytes(2**27))
    assert path.stat().st_size < 2**20
    assert expected in refused(path)


def test_an_archive_with_a_wrong_size(valid, tmp_path):
    path = tmp_path / "lie.keras"
    weights = (valid / "weights" / "small.weights.h5").read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", weights)
    size = len(weights).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (1000).to_bytes(4, "little")))
    assert "cannot be read" in refused(path)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.h5")
    assert "not a regular file" in refused(tmp_path / "pipe.h5")


@pytest.fixture
def run(valid, tmp_path) -> RunDirectory:
    """A copy of the valid run, to be changed."""
    shutil.copytree(valid / "run", tmp_path / "run")
    return RunDirectory(tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[" * 100_000, "not JSON"),
        ('{"head_learning_rate": 1' + "0" * 400 + "}", "head_learning_rate is inf"),
        ('{"backbone": ["os.system"]}', "backbone is"),
        ('{"dataset": "\\u001b[31m"}', "expected non-empty text of printable characters"),
        ('{"module": "os"}', "does not know"),
    ],
)
def test_invalid_settings(content, expected, run):
    run.config_file.write_text(content)
    with pytest.raises(UserError, match=expected) as caught:
        run.read_config()
    assert "\n" not in str(caught.value)


def test_files_that_are_too_large_or_endless(run):
    with run.config_file.open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(UserError, match="larger than 16,777,216 bytes"):
        run.read_config()
    run.labels_file.unlink()
    run.labels_file.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="not a regular file"):
        run.read_class_names()


def test_class_names_are_escaped_for_the_terminal(run):
    run.labels_file.write_text("\x1b]0;title\x07cat\ndog\n")
    assert run.read_class_names() == ("\\x1b]0;title\\x07cat", "dog")
    run.labels_file.write_text("\n" * 100_000)
    with pytest.raises(UserError, match="expected 2 to 65,536 class names"):
        run.read_class_names()


@pytest.mark.parametrize("content", ["[]", "5", '{"cached": 5}', "[" * 100_000])
def test_data_json_of_a_wrong_type(content, run):
    run.data_file.write_text(content)
    with pytest.raises(UserError):
        run.check_data({"train_photos": 64})


def test_a_damaged_line_of_metrics_does_not_affect_the_others(run):
    lines = run.metrics_file.read_bytes().splitlines(keepends=True)
    lines[2] = b"\xff" + lines[2]
    lines[3] = b'{"step": "seven"}\n'
    run.metrics_file.write_bytes(b"".join(lines))
    assert [row["step"] for row in run.read_metrics()] == [1, 2, 5, 6, 7]


@pytest.mark.parametrize("target", ["../../../elsewhere/step-7", "{elsewhere}/step-7"])
def test_a_pointer_to_another_folder_is_not_followed(target, run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in (run.checkpoints / "latest").glob("step-7*"):
        file.rename(elsewhere / file.name)
    pointer = run.checkpoints / "latest" / "checkpoint"
    pointer.write_text(f'model_checkpoint_path: "{target.format(elsewhere=elsewhere)}"\n')
    with pytest.raises(UserError, match="holds no intact checkpoint"):
        find_checkpoint(run.checkpoints, "latest")


def test_a_prepared_symlink_does_not_redirect_writing(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    name = f"figures.json.{platform.node()}-{os.getpid()}.partial"
    (tmp_path / name).symlink_to(mine)
    write_atomically(tmp_path / "figures.json", "{}")
    assert mine.read_text() == "mine"
    assert (tmp_path / "figures.json").read_text() == "{}"


@pytest.mark.parametrize(
    "array",
    [
        {"shape": [8, 64], "dtype": "O"},
        {"shape": [8, 64], "dtype": "object"},
        {"shape": [8, 64], "dtype": "finfo"},
        {"shape": [-8, -64], "dtype": "float32"},
        {"shape": [2**40, 2**40], "dtype": "float32"},
        {"shape": "ab", "dtype": "float32"},
    ],
)
def test_a_cache_entry_of_an_invalid_type_or_shape_is_not_used(array, valid, tmp_path):
    shutil.copytree(valid / "cache", tmp_path / "cache")
    (listing,) = (tmp_path / "cache").glob("*/contents.json")
    contents = json.loads(listing.read_text())
    assert CacheStore(tmp_path / "cache").find(CACHED) is not None
    listing.write_text(json.dumps({**contents, "arrays": [array]}))
    assert CacheStore(tmp_path / "cache").find(CACHED) is None


def test_a_prepared_data_set_cannot_import_code(tmp_path):
    """TFDS would import the module that features.json names."""
    folder = tmp_path / "pets" / "1.0.0"
    folder.mkdir(parents=True)
    inner = json.dumps({"type": "antigravity.Feature", "content": {}})
    for feature in ({"pythonClassName": "antigravity.Feature"}, {"content": inner}):
        (folder / "features.json").write_text(json.dumps({"featuresDict": {"a": feature}}))
        with pytest.raises(UserError, match=r"'antigravity.Feature' is not a feature of"):
            open_source("pets", None, str(tmp_path))
