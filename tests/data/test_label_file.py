"""Labels from a table or from file names, and the splits and groups of a table."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from research.data.folder.folder_options import FolderOptions
from research.data.folder.folder_source import FolderSource
from research.data.folder.label_file import read_label_file
from research.data.source import SPLITS
from research.data.split_arrays import load_split
from research.system.errors import UserError
from tests.helpers import draw_photos

ROWS = "a.jpg;cat\nb.jpg;dog\n"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """12 photos of cats and 12 of dogs in one folder, with the class in their names."""
    folder = tmp_path_factory.mktemp("photos")
    draw_photos(folder, 12)
    for name in ("cat", "dog"):
        for file in (folder / name).iterdir():
            file.rename(folder / f"{name}.{int(file.stem[3:])}.jpg")
        (folder / name).rmdir()
    return folder


def write(folder: Path, *lines: str, name: str = "labels.csv") -> str:
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def labels_of(source: FolderSource) -> dict[str, str]:
    """The class name of each usable photo."""
    return {
        example.name: source.class_names[example.label]
        for split in SPLITS
        for example in source.examples(split)
        if example.image is not None
    }


def problems_of(source: FolderSource) -> dict[str, str]:
    loaded = [load_split(source, split, 8) for split in SPLITS if source.count(split)]
    return {name: reason for split in loaded for name, reason, _ in split.damaged}


@pytest.mark.parametrize(
    "content",
    [
        b"file,label\na.jpg,cat\nb.jpg,dog\n",
        b"\xef\xbb\xbfFile Name;Label\r\na.jpg;cat\r\nb.jpg;dog\r\n",
        "file\tlabel\na.jpg\tcat\nb.jpg\tdog\n".encode("utf-16"),
        b',image_id,Category,x\n0,a.jpg,"cat",1\n1, b.jpg ,dog,\n\n',
        b"sep=;\r\nfile;label\r\na.jpg;cat\r\nb.jpg;dog\r\n",
        b"label,file\ncat,a.jpg\ndog,b.jpg",
        b"id;tags;note\na.jpg;cat;one, two\nb.jpg;dog;",
    ],
)
def test_tables_of_spreadsheets_and_pandas_are_read(tmp_path, content):
    (tmp_path / "table").write_bytes(content)
    rows = read_label_file(str(tmp_path / "table")).rows
    assert [(row.file, row.labels) for row in rows] == [("a.jpg", ("cat",)), ("b.jpg", ("dog",))]
    assert all(row[3:] == (None, None, None) for row in rows)


def test_splits_groups_and_several_labels_are_read(tmp_path):
    table = write(
        tmp_path,
        "path,labels,set,patient_id",
        "x\\a.jpg,cat;dog;cat,Train,7",
        "b.jpg,,valid,",
        "c.jpg, dog ; ,TESTING,8",
    )
    assert [row[1:5] for row in read_label_file(table).rows] == [
        ("x/a.jpg", ("cat", "dog"), "train", "7"),
        ("b.jpg", (), "validation", None),
        ("c.jpg", ("dog",), "test", "8"),
    ]


@pytest.mark.parametrize(
    ("content", "columns", "expected"),
    [
        (b"a.jpg,cat\n", None, "has the columns 'a.jpg', 'cat'; expected a column for the file"),
        (
            b"file,kind\na.jpg,cat\n",
            None,
            "expected a column for the label: name it with --label_c",
        ),
        (b"file,id,label\n1,2,3\n", None, "columns 'file' and 'id' may both be the file; name one"),
        (b"file,label\n", None, "has no rows after its header"),
        (b"", None, "whose first line is empty; expected a CSV or TSV file with a header"),
        (b"", "file=x", "whose first line is empty"),
        (b"file,label,label\na,b,c\n", None, "which has two columns named 'label'; rename one"),
        ("file,label\na,b\n".encode("utf-16-le"), None, "which is not text; save it as UTF-8"),
        (
            b"file,label\ncaf\xe9.jpg,cat\n",
            None,
            "whose line 2 is not UTF-8 text; save it as UTF-8",
        ),
        (b'file,label\n"a.jpg,cat\n', None, "which is not a table"),
        (b"file,label\na,b\n", "label=kind", "label_columns is 'label=kind'; expected file, label"),
        (b"file,label\na,b\n", "names", "it has the columns 'file', 'label'"),
    ],
)
def test_a_table_that_is_not_clear_is_refused_in_one_line(tmp_path, content, columns, expected):
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        read_label_file(str(tmp_path / "table.csv"), columns)
    assert "\n" not in str(caught.value)


def test_a_device_is_not_read():
    with pytest.raises(UserError, match="/dev/zero': a pipe, socket or device, not a file"):
        read_label_file("/dev/zero")


def test_columns_can_be_named(tmp_path):
    table = write(tmp_path, "file,id,kind,split", "x,a.jpg,cat,fold 1", "y,b.jpg,dog,fold 2")
    rows, columns = read_label_file(table, "file=id,label=kind,split=")
    assert columns == {"file": "id", "label": "kind"}
    assert [row[1:] for row in rows] == [
        ("a.jpg", ("cat",), None, None, None),
        ("b.jpg", ("dog",), None, None, None),
    ]


@pytest.mark.parametrize(
    "name",
    [
        lambda path: path.name,
        lambda path: path.stem,
        lambda path: path.name.upper(),
        lambda path: f"somewhere/{path.parent.name}/{path.name}",
        lambda path: f"./{path.parent.name}\\{path.name}",
        str,
    ],
)
def test_photos_are_found_by_path_by_name_and_without_suffix(photos, tmp_path, name):
    files = [photos / f"{kind}.{index}.jpg" for kind in ("cat", "dog") for index in range(12)]
    table = write(tmp_path, "file,label", *(f"{name(file)},{file.name[:3]}" for file in files))
    source = FolderSource(str(photos), FolderOptions(labels=table))
    expected = {name(file).replace("\\", "/"): file.name[:3] for file in files}
    assert labels_of(source) == expected
    assert source.notes == ()


def test_paths_relative_to_the_table_need_no_folder(photos, tmp_path, monkeypatch):
    files = sorted(photos.iterdir())
    relative = [os.path.relpath(file, tmp_path) for file in files]
    table = write(tmp_path, "file,label", *(f"{file},{Path(file).name[:3]}" for file in relative))
    expected = {file: Path(file).name[:3] for file in relative}
    assert labels_of(FolderSource(None, FolderOptions(labels=table))) == expected
    (tmp_path / "other").mkdir()
    moved = str((tmp_path / "labels.csv").rename(tmp_path / "other" / "labels.csv"))
    monkeypatch.chdir(tmp_path)  # as run_predict.py writes paths
    assert labels_of(FolderSource(None, FolderOptions(labels=moved))) == expected
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match=r"do not exist in its folder; .* give --image_folder=DIR"):
        FolderSource(None, FolderOptions(labels=moved))


def test_rows_that_cannot_be_used_are_named_with_the_reason(photos, tmp_path):
    table = write(
        tmp_path,
        "file,label,split,group",
        *(f"cat.{index}.jpg,cat,," for index in range(4, 12)),
        *(f"dog.{index}.jpg,dog,," for index in range(4, 12)),
        "gone.jpg,cat,,",
        "dog.0.jpg,dog,,",
        "dog.0.jpg,cat,,",
        "dog.1.jpg,,,",
        "dog.2.jpg,dog,later,",
        "dog.3.jpg,dog,train,g",
        "cat.3.jpg,cat,test,g",
        ",cat,,",
        "cat.0.jpg,cat,,,more",
        "cat.1.jpg,cat,test,",
        "cat.1.jpg,cat,train,",
        "cat.2.jpg,cat,,",
        "cat.2.jpg,cat,,",
    )
    source = FolderSource(str(photos), FolderOptions(labels=table))
    assert problems_of(source) == {
        "gone.jpg": "names no photo of the folder (line 18)",
        "dog.0.jpg": "different labels in lines 19 and 20: dog, cat",
        "dog.1.jpg": "no label (line 21)",
        "dog.2.jpg": "unknown split 'later'; expected train, validation or test, or "
        "--label_columns=split= to ignore the column (line 22)",
        "dog.3.jpg": "its group 'g' is in several splits",
        "cat.3.jpg": "its group 'g' is in several splits",
        "": "no file name (line 25)",
        "cat.0.jpg": "5 cells, and the header has 4 (line 26)",
        "cat.1.jpg": "different splits in lines 27 and 28",
    }
    assert source.count("train") == 13 + 9  # all of them are in the report of each training
    assert len(labels_of(source)) == 17
    assert source.notes == (
        "1 group of the column 'group' is not divided between splits; --label_columns=group= "
        "ignores the column",
    )
    table = write(tmp_path, "file,label", "cat.0.jpg,cat", "dog.0.jpg,dog", name="few.csv")
    source = FolderSource(str(photos), FolderOptions(labels=table))
    assert source.notes[0] == (
        "22 images (cat.1.jpg, cat.10.jpg, ...) without a row in the label file"
    )


def test_given_splits_are_kept_and_groups_are_never_divided(photos, tmp_path):
    table = write(
        tmp_path,
        "file,label,split,group",
        *(f"cat.{index}.jpg,cat,{'test' if index < 3 else ''},{index // 2}" for index in range(12)),
        *(f"dog.{index}.jpg,dog,,d{index // 3}" for index in range(12)),
    )
    source = FolderSource(str(photos), FolderOptions(labels=table))
    split_of = {one.name: split for split in SPLITS for one in source.examples(split)}
    assert [split_of[f"cat.{index}.jpg"] for index in range(4)] == ["test"] * 4
    assert {split_of[f"cat.{index}.jpg"] for index in range(4, 12)} == {"train", "validation"}
    for group in range(4):
        assert len({split_of[f"dog.{3 * group + index}.jpg"] for index in range(3)}) == 1


def test_several_labels_become_a_vector(photos, tmp_path):
    table = write(tmp_path, "file,label", "cat.0.jpg,cat;pet", "dog.0.jpg,", "dog.1.jpg,dog")
    source = FolderSource(str(photos), FolderOptions(labels=table, shares=(100, 0, 0)))
    assert source.class_names == ("cat", "dog", "pet")
    found = {example.name: example.label.tolist() for example in source.examples("train")}
    assert found == {"cat.0.jpg": [1, 0, 1], "dog.0.jpg": [0, 0, 0], "dog.1.jpg": [0, 1, 0]}
    assert load_split(source, "train", 8).labels.shape == (3, 3)
    # One row per label, if the task has several labels per photo.
    table = write(tmp_path, "file,label", "cat.0.jpg,cat", "cat.0.jpg,pet", "dog.1.jpg,dog")
    options = FolderOptions(labels=table, shares=(100, 0, 0), several_labels=True)
    assert FolderSource(str(photos), options).notes[0].startswith("22 images (")
    found = {x.name: x.label.tolist() for x in FolderSource(str(photos), options).examples("train")}
    np.testing.assert_equal(found, {"cat.0.jpg": [1, 0, 1], "dog.1.jpg": [0, 1, 0]})


def test_the_class_can_be_in_the_file_name(photos, tmp_path):
    source = FolderSource(str(photos), FolderOptions(label_pattern=r"(\w+?)[._]?\d+"))
    assert labels_of(source) == {file.name: file.name[:3] for file in photos.iterdir()}
    with pytest.raises(
        UserError, match=r"is found in none of the 24 names .*, such as 'cat.0.jpg'"
    ):
        FolderSource(str(photos), FolderOptions(label_pattern="(bird)"))
    with pytest.raises(UserError, match=r"has no image in its subfolders; .*--label_pattern=REGEX"):
        FolderSource(str(photos))


def test_photos_that_are_used_are_not_called_left_out(tmp_path):
    """The only folder of a split, with photos in it and in its subfolders."""
    names = [f"train/{folder}{kind}.{n}.jpg" for kind in ("cat", "dog") for n in range(5)
             for folder in ("", "a/", "b/")]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    source = FolderSource(str(tmp_path), FolderOptions(label_pattern=r"([a-z]+)\.\d+"))
    assert sum(source.count(split) for split in SPLITS) == 30
    assert source.summary.endswith("by a hash of each photo's name in train")


def test_photos_without_a_class_in_their_name_are_left_out(tmp_path):
    """As Kaggle's Dogs vs Cats: a folder for training, and a test folder without labels."""
    for name in (*(f"train/{kind}.{n}.jpg" for kind in ("cat", "dog") for n in range(10)),
                 *(f"test1/{n}.jpg" for n in range(5))):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"photo " + name.encode())
    source = FolderSource(str(tmp_path), FolderOptions(label_pattern=r"([a-z]+)\.\d+"))
    assert [source.count(split) for split in SPLITS] == [16, 2, 2]
    assert source.notes == ("5 images (test1/0.jpg, test1/1.jpg, ...) without a class in the name",)


def test_splits_of_rows_overrule_the_folders(tmp_path):
    rows = []
    for folder, split in (("train", "test"), ("extra", "train"), ("test", "train")):
        for name in ("cat", "dog"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.jpg").write_bytes(f"{folder} {name}".encode())
            rows.append(f"{folder}/{name}.jpg,{name},{split}")
    table = write(tmp_path, "file,label,split", *rows)
    source = FolderSource(str(tmp_path), FolderOptions(labels=table, shares=(90, 0, 10)))
    assert {example.name[:5] for example in source.examples("train")} == {"extra", "test/"}
    assert source.summary == "train 4, validation 0, test 2; from the label file"


def test_a_validation_split_of_the_label_file_is_kept(photos, tmp_path):
    rows = [f"{name}.{n}.jpg,{name},{'val' if n < 2 else ''}" for name in ("cat", "dog")
            for n in range(12)]  # fmt: skip
    table = write(tmp_path, "file,label,split", *rows)
    source = FolderSource(str(photos), FolderOptions(labels=table))
    validation = {example.name for example in source.examples("validation")}
    assert validation == {"cat.0.jpg", "cat.1.jpg", "dog.0.jpg", "dog.1.jpg"}
    assert source.count("test") == 2


def test_photos_of_another_folder_change_neither_names_nor_splits(photos, tmp_path):
    (tmp_path / "p").mkdir()
    for file in photos.iterdir():
        (tmp_path / "p" / file.name).write_bytes(file.read_bytes())
    rows = [f"p/{file.name},{file.name[:3]}" for file in photos.iterdir()]

    def splits(*more: str, folder: str | None = None) -> dict[str, str]:
        table = write(tmp_path, "file,label", *rows, *more)
        source = FolderSource(folder, FolderOptions(labels=table))
        return {one.name: split for split in SPLITS for one in source.examples(split)}

    before = splits()
    assert splits(folder=str(tmp_path)) == before
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "1.jpg").write_bytes(b"another")
    assert splits("q/1.jpg,bird") == {**before, "q/1.jpg": "train"}


@pytest.mark.parametrize("folder", ["photos", "photos/train"])
def test_a_row_of_another_folder_is_not_matched_by_its_name(tmp_path, folder):
    for name in ("train/cat/1.jpg", "train/dog/2.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(name.encode())
    rows = ["train/cat/1.jpg,cat", "train/dog/2.jpg,dog", "test/cat/1.jpg,cat", "test/2.jpg,dog"]
    table = write(tmp_path, "file,label", *rows)
    options = FolderOptions(labels=table, shares=(100, 0, 0))
    source = FolderSource(str(tmp_path / folder), options)
    assert set(labels_of(source)) == {"train/cat/1.jpg", "train/dog/2.jpg"}
    missing = {name for name, problem in problems_of(source).items() if "no photo" in problem}
    assert missing == {"test/cat/1.jpg", "test/2.jpg"}


def test_linked_hidden_and_absolute_photos_of_the_table_are_used(photos, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(photos)
    (tmp_path / "root" / ".hidden.jpg").write_bytes(b"hidden")
    rows = [
        "link/cat.1.jpg,cat",
        "link/dog.1.jpg,dog",
        ".hidden.jpg,cat",
        f"{photos}/dog.2.jpg,dog",
    ]
    table = write(tmp_path, "file,label", *rows)
    options = FolderOptions(labels=table, shares=(100, 0, 0))
    source = FolderSource(str(tmp_path / "root"), options)
    assert len(labels_of(source)) == 4
    assert all(example.image for example in source.examples("train"))
    pattern = FolderOptions(label_pattern="(cat|dog)")
    linked = FolderSource(str(tmp_path / "root"), pattern)
    assert sum(linked.count(split) for split in SPLITS) == 24


def test_photos_in_linked_folders_are_found_by_their_name(photos, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(photos)
    table = write(tmp_path, "file,label", "cat.1.jpg,cat", "dog.1.jpg,dog")
    options = FolderOptions(labels=table, shares=(100, 0, 0))
    assert len(labels_of(FolderSource(str(tmp_path / "root"), options))) == 2


def test_a_message_names_the_line_after_a_separator_line(photos, tmp_path):
    table = write(tmp_path, "sep=;", "file;label", "cat.1.jpg;cat", "dog.1.jpg;dog", "gone.jpg;cat")
    source = FolderSource(str(photos), FolderOptions(labels=table, shares=(100, 0, 0)))
    (unusable,) = [one for one in source.listed("train") if one.image is None]
    assert unusable.problem.endswith("(line 5)")
    renamed = write(tmp_path, "sep=;", "file;label", "cat.1.jpg;cat", "dog.1.jpg;dog", "no.jpg;cat")
    other = FolderSource(str(photos), FolderOptions(labels=renamed, shares=(100, 0, 0)))
    assert other.origin("train") != source.origin("train")  # the report is another one


def test_groups_and_odd_separators_are_said(photos, tmp_path):
    rows = [f"{name}.{n}.jpg,{name},{n % 2}" for name in ("cat", "dog") for n in range(12)]
    table = write(tmp_path, "file,label,scene", *rows)
    source = FolderSource(str(photos), FolderOptions(labels=table))
    assert source.notes == (
        "2 groups of the column 'scene' are not divided between splits; --label_columns=group= "
        "ignores the column",
        *(f"no photo is in the {split} split, although its share is 10 %" for split in SPLITS[1:]
          if not source.count(split)),
    )  # fmt: skip
    assert len(source.notes) > 1
    table = write(tmp_path, "file,label", "cat.0.jpg,cat|pet", "dog.0.jpg,dog")
    options = FolderOptions(labels=table, shares=(100, 0, 0), several_labels=True)
    assert FolderSource(str(photos), options).notes[0] == (
        "the label 'cat|pet' contains '|'; expected ';' between several labels"
    )
