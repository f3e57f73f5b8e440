"""A valid file of each kind that the programs read, with the functions to write and read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from research.system.environment import import_tensorflow

CACHED = {"photos": "abc", "layers": [1, 2]}


class Reader:
    """Reads files as the programs do, into its own variables."""

    def __init__(self) -> None:
        import_tensorflow()
        import keras
        import tensorflow as tf

        from research.models.vision_transformer import build_vision_transformer
        from research.models.wrapper import Wrapper

        self._backbone = small_backbone()
        self._transformer = build_vision_transformer((16, 16, 3), None, "small", 64, 1, 8, 16)
        self._state = tf.train.Checkpoint(
            model=Wrapper(self._backbone, 2, 0), step=tf.Variable(7, dtype=tf.int64), averages=[]
        )
        keras.utils.set_random_seed(1)

    def write(self, folder: Path) -> None:
        """Writes a valid file of each kind into an empty folder."""
        write_weights(self._backbone, folder / "weights")
        write_transformer(folder / "transformer")
        write_run(self._state, folder / "run")
        write_cache(folder / "cache")

    def read(self, reader: str, folder: Path, file: Path) -> Any:
        """Returns the content of weights, or of the run or trunk cache with a file.

        Args:
          reader: `weights`, `transformer` for weights of timm, `run` or `cache`.
          folder: the folder with the run or the cache.
          file: the weights.

        Returns:
          The content; None for a cache entry that is not used.

        Raises:
          UserError: the file is refused.
        """
        if reader in ("weights", "transformer"):
            from research.models.weights import load_weights

            self._forget()
            model = self._backbone if reader == "weights" else self._transformer
            load_weights(model, str(file))
            return [variable.numpy() for variable in model.weights]
        if reader == "run":
            return self._read_run(folder / "run")
        from research.data.cache_store import CacheStore

        found = CacheStore(folder / "cache").find(CACHED)
        return None if found is None else [np.array(array) for array in found]

    def _read_run(self, path: Path) -> Any:
        from research.runs.checkpoints import Checkpoints
        from research.runs.restore import find_checkpoint, restore_model
        from research.runs.run_directory import RunDirectory

        self._forget()
        directory = RunDirectory(path)
        texts = [directory.read_config(), directory.read_class_names(), directory.read_metrics()]
        directory.check_data({})
        step = restore_model(self._state.model, find_checkpoint(directory.checkpoints, "latest"))
        Checkpoints(self._state, directory.checkpoints).restore_latest()
        return [texts, directory.read_data(), step, *(v.numpy() for v in self._state.model.weights)]

    def _forget(self) -> None:
        for variable in self._state.model.weights:
            variable.assign(np.full(variable.shape, 0.5, variable.dtype))


def small_backbone() -> Any:
    """Returns a model with three layers and the structure of a backbone."""
    import keras
    from keras import layers

    images = keras.Input((32, 32, 3))
    features = layers.Conv2D(8, 3, name="first")(images)
    features = layers.BatchNormalization(name="norm")(features)
    return keras.Model(images, layers.SeparableConv2D(16, 3, name="last")(features))


def write_weights(model: Any, folder: Path) -> None:
    """Writes a model's weights in every format that could be given to `--weights`."""
    import zipfile

    import h5py
    import tensorflow as tf

    folder.mkdir()
    model.save_weights(folder / "small.weights.h5")
    model.save(folder / "small.keras")
    model.save(folder / "small.h5")
    tf.saved_model.save(model, str(folder / "saved_model"))
    with (
        h5py.File(folder / "small.weights.h5") as source,
        h5py.File(folder / "compressed.weights.h5", "w") as target,
    ):
        found: list[tuple[str, Any]] = []
        source.visititems(lambda name, item: found.append((name, item)))
        for name, item in found:
            if isinstance(item, h5py.Dataset):
                filters: dict[str, Any] = {"compression": "gzip", "shuffle": True}
                target.create_dataset(name, data=item[()], chunks=True, **filters)
    with zipfile.ZipFile(folder / "compressed.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "small.weights.h5", "model.weights.h5")


def write_transformer(folder: Path) -> None:
    """Writes weights of a very small vision transformer, with the names of timm."""
    from tests.models.safetensors_files import write_safetensors

    shapes = {
        "cls_token": (1, 1, 64),
        "pos_embed": (1, 5, 64),
        "patch_embed.proj.weight": (64, 3, 8, 8),
        "blocks.0.attn.qkv.weight": (192, 64),
        "blocks.0.attn.qkv.bias": (192,),
        "blocks.0.attn.proj.weight": (64, 64),
        "blocks.0.mlp.fc1.weight": (256, 64),
        "blocks.0.mlp.fc1.bias": (256,),
        "blocks.0.mlp.fc2.weight": (64, 256),
    }
    biases = ("patch_embed.proj.bias", "blocks.0.attn.proj.bias", "blocks.0.mlp.fc2.bias")
    norms = [
        f"{name}.{kind}"
        for name in ("blocks.0.norm1", "blocks.0.norm2", "norm")
        for kind in ("weight", "bias")
    ]
    random = np.random.default_rng(0)
    all_shapes = {**shapes, **dict.fromkeys([*biases, *norms], (64,))}
    tensors = {name: random.normal(size=shape) for name, shape in all_shapes.items()}
    folder.mkdir()
    write_safetensors(folder / "small.safetensors", tensors)


def write_run(state: Any, folder: Path) -> None:
    """Writes a run that has reached step 7."""
    from research.runs.checkpoints import Checkpoints
    from research.runs.run_directory import FIGURES, RunDirectory
    from research.settings.train_config import TrainConfig

    directory = RunDirectory(folder)
    config = TrainConfig(backbone="SmallResNet", image_size=32, weights="none")
    directory.create(config, ("cat", "dog"), {"train_photos": 64, "cached": {"features": True}})
    for step in range(1, 8):
        directory.append_metrics({**dict.fromkeys(FIGURES, 0.25), "step": step, "epoch": step})
    Checkpoints(state, directory.checkpoints).save(7)


def write_cache(folder: Path) -> None:
    """Writes a trunk cache with one entry."""
    from research.data.cache_store import CacheStore, MakeRows
    from research.data.rows import Rows

    def make(make_rows: MakeRows) -> list[Rows]:
        values = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
        rows = make_rows(values.shape, values.dtype)
        rows.append(values)
        return [rows]

    CacheStore(folder).find_or_make(CACHED, make)
