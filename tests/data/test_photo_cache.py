"""Decoded photos in memory, on disk and on demand give the same batches."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import threading
import time

import numpy as np
import pytest

from research.data import photo_cache
from research.data.augmentation import AugmentationPipeline, HorizontalFlip, Mixing
from research.data.cache_store import CacheStore
from research.data.folder import findings, folder_source
from research.data.folder.folder_options import FolderOptions
from research.data.folder.folder_source import FolderSource
from research.data.loader import DataLoader
from research.data.order import Share
from research.data.photo_cache import PhotoCache, without_damaged
from research.data.relabelled_source import RelabelledSource
from research.data.source import SPLITS, Example, Source
from research.inspect_data.inspect import inspect
from research.system.errors import UserError
from research.system.program import ended_by_a_line

SIZE = 16
SETTINGS = ("memory", "disk", "none")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(photo_cache, "CHUNK_BYTES", 3 * SIZE * SIZE * 7)


@pytest.fixture
def photos(photo_folder, tmp_path):
    return shutil.copytree(photo_folder, tmp_path / "photos")


def loader_of(folder, setting, source=None, **settings) -> DataLoader:
    return DataLoader(
        SIZE,
        8,
        source=source or FolderSource(str(folder / "photos")),
        photo_cache=PhotoCache(setting, str(folder / "cache")),
        **settings,
    )


def damage(photos) -> str:
    """Cuts off a training photo; returns its name."""
    source = FolderSource(str(photos))
    name = source.listed("train")[3].name
    file = photos / name
    file.write_bytes(file.read_bytes()[:200])
    return name


def assert_same_batches(loaders, batches_of):
    first, *others = ([*batches_of(loader).as_numpy_iterator()] for loader in loaders)
    assert first
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert one.keys() == two.keys()
            for key in one:
                np.testing.assert_array_equal(one[key], two[key])


def test_batches_are_the_same_wherever_photos_are_kept(photos, tmp_path):
    changed = AugmentationPipeline([HorizontalFlip(), Mixing(0.5, 0.5)])
    loaders = [
        loader_of(tmp_path, setting, augmentation=changed, mirror_averaging=True)
        for setting in (*SETTINGS, "disk", "auto")
    ]
    share = Share(replicas=2, first=1, count=1, parts=2)
    assert_same_batches(loaders, lambda loader: loader.epoch_batches(1, 1, share))
    assert_same_batches(loaders, lambda loader: loader.split_batches("validation"))
    first, *others = (loader.examples("train") for loader in loaders)
    for other in others:
        assert other.names == first.names
        np.testing.assert_array_equal(other.labels, first.labels)


def test_photos_on_disk_are_not_decoded_again(photos, tmp_path, monkeypatch, capsys):
    made = loader_of(tmp_path, "disk").examples("train")
    assert "photo cache  on disk, 0.0 MB" in capsys.readouterr().out
    decoded = []
    monkeypatch.setattr(photo_cache, "decode_examples", lambda *_: decoded.append(1))
    for setting in ("disk", "auto"):
        found = loader_of(tmp_path, setting).examples("train")
        assert "photo cache  on disk, found there, 0.0 MB" in capsys.readouterr().out
        assert (found.names, found.digests) == (made.names, made.digests)
        rows = np.arange(len(made))[::-2]
        np.testing.assert_array_equal(
            found.inputs[0].take(rows, axis=0), made.inputs[0].take(rows, axis=0)
        )
    assert not decoded


@pytest.mark.parametrize("change", ["content", "label", "size", "resize", "decoder"])
def test_photos_on_disk_that_changed_are_decoded_again(photos, tmp_path, monkeypatch, change):
    loader_of(tmp_path, "disk").examples("train")
    entries = {path.name for path in (tmp_path / "cache/photos").iterdir()}
    settings = {}
    if change == "content":
        file = photos / FolderSource(str(photos)).listed("train")[-1].name
        status = file.stat()
        content = bytearray(file.read_bytes())
        content[-10] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time
    elif change == "label":
        name = FolderSource(str(photos)).class_names[0]
        (photos / name).rename(photos / "zebra")
    elif change == "decoder":
        monkeypatch.setattr(photo_cache, "decoder_versions", lambda: {"pillow": "1"})
    elif change == "resize":
        settings["resize"] = "crop"
    loader = loader_of(tmp_path, "disk", **settings)
    loader.image_size = SIZE + 1 if change == "size" else SIZE
    loader.examples("train")
    assert {path.name for path in (tmp_path / "cache/photos").iterdir()} > entries
    settings["photo_cache"] = PhotoCache("memory")
    memory = loader.with_augmentation(loader.augmentation)
    memory.loaded, memory.photo_cache = {}, PhotoCache("memory")
    assert_same_batches([loader, memory], lambda one: one.epoch_batches(0))


def test_a_cache_that_does_not_match_the_photos_is_made_again(photos, tmp_path, monkeypatch):
    """A decoder can change without another version."""
    right = loader_of(tmp_path, "disk").examples("train").inputs[0].take(np.arange(5), axis=0)
    (entry, *_) = sorted((tmp_path / "cache/photos").glob("*/0.bin"))
    entry.write_bytes(bytes(entry.stat().st_size))
    found = loader_of(tmp_path, "disk").examples("train").inputs[0]
    np.testing.assert_array_equal(found.take(np.arange(5), axis=0), right)


def test_a_photo_that_could_not_be_read_once_is_used_again(photos, tmp_path, monkeypatch):
    source = FolderSource(str(photos))
    read, failing = FolderSource.read, source.listed("train")[5].name

    def read_with_failure(self, split, index):
        example = read(self, split, index)
        failed = example._replace(image=None, problem="cannot be read: Stale file handle")
        return failed if example.name == failing else example

    monkeypatch.setattr(FolderSource, "read", read_with_failure)
    for _ in range(2):
        damaged = loader_of(tmp_path, "disk").examples("train").damaged
        assert damaged == ((failing, "cannot be read: Stale file handle", 5),)
    monkeypatch.setattr(FolderSource, "read", read)
    loaders = [loader_of(tmp_path, setting) for setting in SETTINGS]
    assert_same_batches(loaders, lambda loader: loader.epoch_batches(0))
    assert loaders[1].examples("train").damaged == ()


def test_a_photo_on_demand_has_weight_again_when_it_can_be_read(photos, tmp_path, monkeypatch):
    source = FolderSource(str(photos))
    read, failing = FolderSource.read, {source.listed("train")[5].name}

    def read_with_failures(self, split, index):
        example = read(self, split, index)
        failed = example._replace(image=None, problem="cannot be read: Stale file handle")
        return failed if example.name in failing else example

    monkeypatch.setattr(FolderSource, "read", read_with_failures)
    pixels = loader_of(tmp_path, "none").examples("train").inputs[0]
    rows = np.arange(len(pixels))
    pixels.take(rows)
    assert np.flatnonzero(pixels.weights == 0).tolist() == [5]
    assert [index for _, _, index in pixels.damaged] == [5]
    failing.clear()
    pixels.take(rows)
    assert pixels.weights.all()
    assert pixels.damaged == ()
    failing.update(one.name for one in source.listed("train"))
    with pytest.raises(UserError, match="Stale file handle; another photo that was read before"):
        pixels.take(rows[:4])
    assert pixels.weights.all()


def test_a_photo_that_is_removed_does_not_end_a_run(photos, tmp_path):
    pixels = loader_of(tmp_path, "none").examples("train").inputs[0]
    pixels.take(np.arange(len(pixels)))
    pixels.take(np.array([2]))  # also if it was read last
    (photos / FolderSource(str(photos)).listed("train")[2].name).unlink()
    pixels.take(np.array([2]))
    pixels.take(np.array([2, 3]))
    assert np.flatnonzero(pixels.weights == 0).tolist() == [2]


def test_photos_that_cannot_be_read_any_more_end_a_program_with_a_line(
    photos, tmp_path, monkeypatch, capsys
):
    loader = loader_of(tmp_path, "none")
    list(loader.epoch_batches(0))
    shutil.rmtree(photos)
    with pytest.raises(SystemExit) as ended, ended_by_a_line():
        list(loader.epoch_batches(1))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be read: No such file or directory; another photo that was read" in line
    assert line.endswith("give the same command again when the photos can be read")


def test_a_damaged_photo_has_no_weight(photos, tmp_path, capsys):
    name = damage(photos)
    loaders = [loader_of(tmp_path, setting) for setting in SETTINGS]
    in_memory, on_disk, on_demand = (loader.examples("train") for loader in loaders)
    assert in_memory.damaged == on_disk.damaged != ()
    assert len(on_demand) == len(in_memory) + 1
    assert on_demand.damaged == ()
    weights = {}
    for _ in range(2):
        for batch in loaders[2].epoch_batches(0).as_numpy_iterator():
            for pixels, weight in zip(batch["image"], batch["weight"], strict=True):
                weights[pixels.tobytes()] = weight
    assert sorted(weights.values()) == [0.0] + [1.0] * len(in_memory)
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.startswith(f"skipped a damaged train photo (1 so far): {name}: ")
    usable = without_damaged(on_demand)
    assert (usable.names, usable.damaged) == (in_memory.names, in_memory.damaged)
    np.testing.assert_array_equal(usable.labels, in_memory.labels)
    rows = np.arange(len(usable))
    np.testing.assert_array_equal(
        usable.inputs[0].take(rows, axis=0), in_memory.inputs[0].take(rows, axis=0)
    )


def test_a_photo_that_is_mixed_with_a_damaged_one_has_no_weight(photos, tmp_path):
    damage(photos)
    mixed = AugmentationPipeline([Mixing(1.0, 0.0)])
    loader = loader_of(tmp_path, "none", augmentation=mixed)
    count = len(loader.examples("train"))
    weights = [batch["weight"] for batch in loader.epoch_batches(0).as_numpy_iterator()]
    assert np.concatenate(weights).sum() == count - 2


def test_two_processes_decode_different_photos_at_the_same_time(photos, tmp_path, monkeypatch):
    """The chunk that another process decodes comes last, and is taken from that process."""
    decoded = []
    decode = photo_cache.decode_examples

    def recorded(examples, pixels, *others):
        decoded.append(pixels.shape[0])
        return decode(examples, pixels, *others)

    monkeypatch.setattr(photo_cache, "decode_examples", recorded)
    expected = loader_of(tmp_path, "disk").examples("train")
    whole, decoded[:] = [*decoded], []
    shutil.rmtree(tmp_path / "cache/photos")
    loader = loader_of(tmp_path, "disk")
    chunks = photo_cache._Chunks(
        loader.photo_cache.store, loader.source, "train", SIZE, loader.resize
    )
    first = chunks._chunks[0]
    ready = threading.Event()
    other_store = CacheStore(tmp_path / "cache/photos")
    (tmp_path / "cache/photos").mkdir(parents=True)

    def other_process():
        with other_store.lock(first.described):
            ready.set()
            while len(decoded) < len(whole) - 1:
                time.sleep(0.01)

    thread = threading.Thread(target=other_process)
    thread.start()
    ready.wait()
    found = loader.examples("train")
    thread.join()
    assert decoded == [*whole[1:], whole[0]]
    assert found.names == expected.names


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_each_host_decodes_only_the_photos_of_its_own_devices(photos, tmp_path, hosts):
    """A batch of 6 does not divide evenly among 4 hosts; together they decode each photo."""
    read = []

    class Recorded(FolderSource):
        def read(self, split, index):
            read.append(index)
            return super().read(split, index)

    source = Recorded(str(photos))
    loader = loader_of(tmp_path, "none", source)
    loader.batch_size = 6
    count = len(loader.examples("train"))
    rows = -(-count // 6) * -(-6 // hosts)  # of one host, with padding
    found = set()
    for host in range(hosts):
        read.clear()
        for _ in loader.epoch_batches(0, share=Share(hosts, host, 1)):
            pass
        assert len(read) == rows
        found.update(read)
    assert found == set(range(count))


class InOrder(Source):
    """A source without random access, whose photos are recognised."""

    class_names = ("a", "b")
    passes = 0
    yields = 20
    extra_damaged = False

    def count(self, split):
        return 20

    def examples(self, split):
        self.passes += 1
        for index in range(self.yields):
            pixels = (
                None if index >= 20 and self.extra_damaged else np.full((4, 4, 3), index, np.uint8)
            )
            yield Example(pixels, index % 2, f"{index}", arrays={"index": index})

    def origin(self, split):
        return f"InOrder 1 {split}"


def test_a_source_without_random_access_is_read_once_and_kept_on_disk(tmp_path):
    source = InOrder()
    loaders = [loader_of(tmp_path, "disk", source), loader_of(tmp_path, "memory", source)]
    loaders[0].examples("train")
    assert source.passes == 1
    assert_same_batches(loaders, lambda loader: loader.epoch_batches(0))
    np.testing.assert_array_equal(loaders[0].examples("train").arrays["index"], np.arange(20))
    with pytest.raises(UserError, match="photo_cache is 'none', but InOrder reads its photos only"):
        loader_of(tmp_path, "none", source).examples("train")


@pytest.mark.parametrize("setting", ["memory", "disk"])
@pytest.mark.parametrize(
    ("yields", "damaged", "relation"),
    [(19, False, "fewer"), (21, False, "more"), (21, True, "more")],
)
def test_a_source_yields_as_many_photos_as_its_count(tmp_path, setting, yields, damaged, relation):
    source = InOrder()
    source.yields, source.extra_damaged = yields, damaged
    with pytest.raises(UserError, match=f"yields {relation} photos than its count, 20; correct"):
        loader_of(tmp_path, setting, source).examples("train")


@pytest.mark.parametrize(("lists", "relation"), [(19, "fewer"), (21, "more")])
def test_photos_that_are_not_kept_are_counted_too(tmp_path, lists, relation):
    class Listed(InOrder):
        random_access = True

        def listed(self, split):
            return [Example(b"", index % 2, f"{index}") for index in range(lists)]

    with pytest.raises(UserError, match=f"yields {relation} photos than its count, 20; correct"):
        loader_of(tmp_path, "none", Listed()).examples("train")


@pytest.mark.parametrize(("yields", "relation"), [(19, "fewer"), (21, "more")])
def test_an_inspection_counts_the_photos(yields, relation):
    source = InOrder()
    source.yields = yields
    with pytest.raises(UserError, match=f"yields {relation} photos than its count, 20; correct"):
        inspect(source, distance=10)


def test_a_source_without_origin_is_not_kept_on_disk(tmp_path):
    class Unknown(InOrder):
        def origin(self, split):
            return None

    with pytest.raises(UserError, match=r"photo_cache is 'disk', but Unknown has no origin"):
        loader_of(tmp_path, "disk", Unknown()).examples("train")
    assert not (tmp_path / "cache").exists()
    assert len(loader_of(tmp_path, "auto", Unknown()).examples("train")) == 20


def test_auto_takes_the_first_place_with_room(photos, tmp_path, monkeypatch, capsys):
    def place(memory, cache, temporary, many=10**6) -> str:
        monkeypatch.setattr(photo_cache, "MANY_PHOTOS", many)
        monkeypatch.setattr(photo_cache, "fits_in_memory", lambda size: memory)
        free = {True: 10**12, False: 0}
        monkeypatch.setattr(
            photo_cache,
            "free_disk",
            lambda folder: free[cache if folder.is_relative_to(tmp_path / "cache") else temporary],
        )
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        return type(loader_of(tmp_path, "auto").examples("train").inputs[0]).__name__

    assert place(memory=True, cache=True, temporary=True) == "ndarray"
    assert place(memory=True, cache=True, temporary=True, many=1) == "JoinedRows"
    assert place(memory=True, cache=False, temporary=True, many=1) == "ndarray"
    assert place(memory=False, cache=True, temporary=True) == "JoinedRows"
    capsys.readouterr()
    assert place(memory=False, cache=False, temporary=False) == "PhotosOnDemand"
    assert "photo cache  none: " in capsys.readouterr().out


def test_relabelled_photos_can_be_read_on_demand_and_kept(photos, tmp_path):
    source = FolderSource(str(photos))
    other = RelabelledSource(source, ("first", *source.class_names[::-1]))
    loaders = [loader_of(tmp_path, setting, other) for setting in SETTINGS]
    assert_same_batches(loaders, lambda loader: loader.epoch_batches(0))
    assert other.origin("train") != source.origin("train")
    more = RelabelledSource(source, (*other.class_names, "last"))
    assert more.origin("train") != other.origin("train")  # label vectors have another length


def test_copies_among_many_photos_are_kept(photos, tmp_path, monkeypatch):
    first = FolderSource(str(photos)).listed("train")[0].name
    shutil.copy(photos / first, photos / first.replace("/", "/a copy of "))
    monkeypatch.setattr(folder_source, "MANY_PHOTOS", 1)
    options = FolderOptions(cache_dir=str(tmp_path / "cache"))
    expected = FolderSource(str(photos), options)
    monkeypatch.setattr(findings, "_compare", None)
    found = FolderSource(str(photos), options)
    for split in SPLITS:
        assert found.listed(split) == expected.listed(split)
    (photos / first).write_bytes(b"other content")
    with pytest.raises(TypeError):  # compared again
        FolderSource(str(photos), options)


def test_optional_decoders_need_not_be_installed(monkeypatch):
    installed = {**photo_cache.decoder_versions(), "pillow-heif": "1.2"}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert photo_cache.decoder_versions() == installed
    del installed["pillow-heif"]
    assert photo_cache.decoder_versions() == installed
    assert set(installed) - {"cykooz-resizer"} == {"pillow", "simplejpeg", "numpy"}
