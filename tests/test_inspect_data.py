"""`python -m research.inspect_data`: its findings in drawn photos, and its command line."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from research.data.built_in.sketches import sketch_jpeg
from research.data.folder.folder_source import FolderSource
from research.data.source import SPLITS
from research.inspect_data.__main__ import main
from research.inspect_data.fingerprints import MAX_PAIRS, fingerprint, similar_pairs
from research.inspect_data.inspect import Duplicate, Inspection, Photo, inspect
from research.inspect_data.report import _shorten, report
from research.settings.program_configs import InspectConfig
from research.system.errors import UserError
from tests.helpers import ROOT, draw_photos, launcher, script_environment


def run_inspection(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    module = ["-m", "research.inspect_data"]
    return launcher().run([*module, *flags], folder, script_environment(folder))


def photo(label: int, index: int) -> Image.Image:
    return Image.open(io.BytesIO(sketch_jpeg(label, index))).convert("RGB")


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def cropped(image: Image.Image, share: float) -> Image.Image:
    x, y = round(image.width * share), round(image.height * share)
    return image.crop((x, y, image.width - x, image.height - y))


def resized(image: Image.Image, scale: float) -> Image.Image:
    return image.resize((round(image.width * scale), round(image.height * scale)))


CHANGES = {
    "saved at quality 20": lambda image: jpeg(image, 20),
    "half as large": lambda image: jpeg(resized(image, 0.5)),
    "three times as large": lambda image: jpeg(resized(image, 3)),
    "brighter": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(1.15)),
    "grey": lambda image: jpeg(image.convert("L")),
    "cropped": lambda image: jpeg(cropped(image, 0.02)),
}


def alike(contents: list[bytes], distance: int = InspectConfig().distance) -> set[tuple[int, int]]:
    prints = [fingerprint(content) for content in contents]
    hashes, thumbnails = (np.stack([one[column] for one in prints]) for column in (4, 5))
    return {(one, other) for one, other, _ in similar_pairs(hashes, thumbnails, distance)}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_look_alike_and_different_photos_do_not(change):
    originals = [photo(label, index) for label in (0, 1) for index in range(20)]
    contents = [jpeg(image) for image in originals] + [CHANGES[change](im) for im in originals]
    assert alike(contents) == {(index, index + 40) for index in range(40)}


def test_plain_photos_never_look_alike():
    plain = [png(Image.new("RGB", (60, 40), (shade,) * 3)) for shade in (0, 90, 91, 255)]
    assert alike([*plain, png(Image.new("RGB", (1, 1)))], 256) == set()


def test_photos_of_all_modes_have_a_fingerprint():
    deep = Image.fromarray(np.arange(4000, dtype=np.uint16).reshape(50, 80) * 16)
    for content, size in [
        (png(deep), (80, 50)),
        (png(Image.new("RGBA", (9, 5), "red")), (9, 5)),
        (png(Image.new("1", (3000, 1))), (3000, 1)),
    ]:
        assert fingerprint(content)[:2] == size


def test_equality_of_pixels_does_not_depend_on_the_format():
    first, second = photo(0, 1), photo(0, 2)
    prints = [fingerprint(content) for content in (png(first), png(second), png(first) + b"more")]
    assert prints[0].pixel_digest == prints[2].pixel_digest != prints[1].pixel_digest
    assert len({one.file_digest for one in prints}) == 3


def test_pairs_are_found_across_blocks_up_to_a_limit():
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**63, (700, 4)).astype(np.uint64)
    thumbnails = random.integers(0, 256, (700, 256)).astype(np.uint8)
    for first, second in ((3, 690), (255, 256), (400, 410)):
        hashes[second], thumbnails[second] = hashes[first] ^ np.uint64(1), thumbnails[first]
    assert similar_pairs(hashes, thumbnails, 4) == [(3, 690, 4), (255, 256, 4), (400, 410, 4)]
    assert similar_pairs(hashes, thumbnails, 3) == []
    equal = np.tile(np.arange(256, dtype=np.uint8), (700, 1))
    assert len(similar_pairs(hashes * np.uint64(0), equal, 0)) == MAX_PAIRS


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Drawn photos with copies among them, and the names of the copies."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "train").mkdir()
    draw_photos(folder / "train", 25)
    places = {}

    def put(what: str, split: str, content: bytes, label: str = "cat", ending: str = "jpg") -> None:
        places[what] = f"{split}/{label}/{what}.{ending}"
        (folder / places[what]).parent.mkdir(parents=True, exist_ok=True)
        (folder / places[what]).write_bytes(content)

    put("file", "train", jpeg(photo(0, 500)))
    put("file again", "test", jpeg(photo(0, 500)))
    put("pixels", "train", jpeg(photo(0, 501)))
    decoded = Image.open(folder / places["pixels"]).convert("RGB")
    put("pixels again", "validation", png(decoded), ending="png")
    put("alike", "train", jpeg(photo(1, 502)), "dog")
    put("alike again", "test", jpeg(resized(photo(1, 502), 0.6), 50), "dog")
    put("contradiction", "train", jpeg(photo(1, 503)), "dog")
    put("contradicted", "train", jpeg(photo(1, 503)), "cat")
    put("within", "train", jpeg(photo(1, 504)), "dog")
    put("within again", "train", jpeg(photo(1, 504), 40), "dog")
    put("damaged", "train", b"<html>gone</html>")
    put("empty", "test", b"", "dog")
    return folder, places


@pytest.fixture(scope="module")
def inspected(planted, tmp_path_factory):
    folder, _ = planted
    cwd = tmp_path_factory.mktemp("inspected")
    process = run_inspection(cwd, f"--image_folder={folder}", "--out=a report")
    assert process.returncode == 0, process.stderr
    return process, cwd


def test_duplicates_leaks_and_contradictions_are_named(planted, inspected):
    _, places = planted
    process, cwd = inspected
    found = json.loads((cwd / "a report" / "inspection.json").read_text())
    pairs = {
        (duplicate["kind"], duplicate["is_leak"], duplicate["is_contradiction"]): {
            photo["name"] for photo in duplicate["photos"]
        }
        for duplicate in found["duplicates"]
    }
    assert pairs == {
        ("same file", True, False): {places["file"], places["file again"]},
        ("same pixels", True, False): {places["pixels"], places["pixels again"]},
        ("looks alike", True, False): {places["alike"], places["alike again"]},
        ("same file", False, True): {places["contradiction"], places["contradicted"]},
        ("looks alike", False, False): {places["within"], places["within again"]},
    }
    assert len(found["duplicates"]) == 5
    for name in places.values():
        assert name in process.stdout
    leaks = process.stdout.partition("Leaks")[2].partition("Contradictions")[0]
    assert f"train       {places['alike']} (dog)" in leaks
    assert f"test        {places['alike again']} (dog)" in leaks
    assert places["within"] not in leaks


def test_counts_sizes_and_damage_are_reported(planted, inspected):
    folder, places = planted
    process, cwd = inspected
    found = json.loads((cwd / "a report" / "inspection.json").read_text())
    assert len(found["photos"]) == 60
    assert {photo["name"]: photo["damage"] for photo in found["damaged"]} == {
        places["damaged"]: "not an image but an HTML page",
        places["empty"]: "empty file",
    }
    for entry in found["photos"][:10]:
        with Image.open(folder / entry["name"]) as image:
            assert (entry["width"], entry["height"]) == image.size
    source = FolderSource(str(folder))
    counts = [sum(e["split"] == split for e in found["photos"]) for split in SPLITS]
    stored = [source.count(split) for split in SPLITS]
    assert [counts[0] + 1, counts[1], counts[2] + 1] == stored
    rows = {line.split()[0]: line.split()[1:] for line in process.stdout.splitlines() if line}
    assert rows["all"] == [str(count) for count in (*counts, 60)]
    assert rows["damaged"] == ["1", "0", "1", "2"]
    assert process.stdout.startswith(
        "splits       train 58, validation 1, test 3; from the folders train and\n"
        "             validation and test\n"
        f"note: 1 photo has copies in several splits, such as {places['file']} and\n"
    )
    widths = sorted(entry["width"] for entry in found["photos"])
    assert rows["width"] != [] and f"{widths[0]:,}" in process.stdout
    assert f"{places['damaged']}: not an image but an HTML page" in process.stdout
    last = process.stdout.splitlines()[-1]
    assert last == "62 photos, 2 damaged, 5 duplicates, 3 leaks, 1 contradiction"


def test_the_report_fits_80_columns_and_the_figures_are_images(inspected):
    process, cwd = inspected
    assert process.stderr == ""
    assert max(map(len, process.stdout.splitlines())) <= 80
    files = sorted(path.name for path in (cwd / "a report").iterdir())
    assert files == ["duplicates.png", "inspection.json", "photos.png"]
    for name in ("duplicates.png", "photos.png"):
        with Image.open(cwd / "a report" / name) as image:
            assert image.width >= 800
    assert sorted(path.name for path in cwd.iterdir()) == ["a report"]


def test_long_names_and_many_findings_are_shortened():
    photos = tuple(
        Photo(split, place, f"{'very ' * 30}long {place}.jpg", (place % 2,), 100, 100)
        for split in SPLITS
        for place in range(20)
    )
    damaged = tuple(Photo("train", 20 + i, "x" * 90, (0,), damage=f"{i} " * 60) for i in range(30))
    duplicates = tuple(Duplicate("same file", photos[:n]) for n in range(2, 40))
    names = ("a class with a long name " * 3, "b")
    text = report(Inspection(names, photos + damaged, duplicates, is_cut=True))
    assert max(map(len, text.splitlines())) <= 80
    assert "... and 20 more photos" in text
    assert "only the first 100,000 that look alike" in text
    assert text.count("same file\n") < 30
    assert _shorten("abcdefghij", 7) == "ab...ij"


def test_a_set_without_any_usable_photo_is_reported(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"")
    found = inspect(FolderSource(str(tmp_path)), 72)
    assert report(found).endswith("2 photos, 2 damaged, 0 duplicates, 0 leaks, 0 contradictions")


def test_several_labels_of_a_photo_are_no_damage(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    draw_photos(tmp_path / "photos", 3)
    names = sorted(str(one.relative_to(tmp_path / "photos")) for one in tmp_path.rglob("*.jpg"))
    rows = [f"{name},{label}" for name in names for label in ("a", "b")]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *rows[:-2], f"{names[-1]},"]))
    config = InspectConfig(
        image_folder=f"{tmp_path}/photos", labels=f"{tmp_path}/labels.csv", task="multi_label"
    )
    main(config)
    assert "6 photos, 0 damaged" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no image"):
        main(dataclasses.replace(config, task="classification"))


def test_help_names_every_setting_at_once(tmp_path):
    begin = time.perf_counter()
    command = [sys.executable, "-m", "research.inspect_data", "--help"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert time.perf_counter() - begin < 5
    assert process.returncode == 0
    for field in dataclasses.fields(InspectConfig):
        assert f"--{field.name}:" in process.stdout
    assert max(map(len, process.stdout.splitlines())) <= 80


def test_arguments_import_no_tensorflow():
    code = (
        "import sys, research.inspect_data.__main__; "
        "sys.exit(bool({'tensorflow', 'keras', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--image_foldr=x",), "flag 'image_foldr'. Did you mean: image_folder"),
        (("--distance=far",), "flag --distance=far: expected an integer"),
        (("--distance=300",), "distance is 300; expected an integer of at most 256"),
        (("--distance=-1",), "distance is -1; expected an integer of at least 0"),
        (("--distance",), "Missing value for flag --distance"),
        (("PHOTOS",), "'PHOTOS' is not a flag; write flags as --name=value"),
        (("--image_folder=",), "image_folder is ''; expected non-empty text"),
        # The remaining errors are found after TensorFlow is imported.
        (("--image_folder=gone", "--out=out"), "expected a folder that exists"),
        (("--image_folder=.", "--out=a_file"), "not a folder"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_on_disk(tmp_path, flags, expected):
    (tmp_path / "a_file").write_text("mine")
    process = run_inspection(tmp_path, *flags)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("inspect_data: ")
    assert expected in line
    assert process.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_of_many_classes_those_with_the_fewest_photos_are_printed():
    photos = [
        Photo("train", place, f"{label}-{place}", (label,), 9, 9)
        for label in range(300)
        for place in range(1 if label == 200 else 2)
    ]
    text = report(Inspection(tuple(f"class{k}" for k in range(300)), tuple(photos), ()))
    lines = text.partition("\n\n")[0].splitlines()
    assert lines[2].split() == ["class200", "1", "0", "0", "1"]
    assert lines[3].split() == ["class0", "2", "0", "0", "2"]
    assert lines[42].split() == ["all", "599", "0", "0", "599"]
    assert lines[44:] == ["  ... and 260 more classes, which do not have fewer photos"]
