"""Runs networks of timm with random weights; `timm_reference.py` starts it where timm is installed.

python benchmarks/timm_forward.py FOLDER

FOLDER contains `job.json`: a list of networks, each with a name, the class or model of timm, its
options, image sizes, and whether its features are pooled. For each network, its weights are written
to NAME.safetensors, and its features for random photos to NAME.npz.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# The ends of names of scales, which are near 1.
SCALES = (
    *("norm.weight", "norm1.weight", "norm2.weight", "gamma", "norm_head.weight"),
    *(".bn.weight", "bn1.weight", "bn2.weight", "running_var"),
)


def random_values(seed: int, shapes: Iterable[tuple[int, ...]]) -> Iterator[np.ndarray]:
    """Yields float32 values in [-1, 1) that are equal in all versions of NumPy."""
    random = np.random.default_rng(seed)
    for shape in shapes:
        yield (2 * random.random(shape) - 1).astype(np.float32)


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns weights that keep the scale of the signal and are never 0 or 1 as initial ones are.

    Args:
      shapes: the shape of each tensor by its name; the order changes the values.
    """
    values = random_values(0, shapes.values())
    state = {}
    for (name, shape), value in zip(shapes.items(), values, strict=True):
        if len(shape) in (2, 4):  # kernels of dense layers and convolutions
            value = value * (3.0 / np.prod(shape[1:])) ** 0.5
        elif name.endswith(SCALES):
            value = 1 + 0.5 * value
        elif name.endswith("num_batches_tracked"):
            state[name] = np.array(3)  # a counter, which no network uses
            continue
        state[name] = np.asarray(0.3 * value if name.endswith("bias") else value, np.float32)
    return state


def photos(size: int) -> np.ndarray:
    """Returns two random photos, float32 (2, size, size, 3) in [0, 255)."""
    return 127.5 * (next(random_values(size, [(2, size, size, 3)])) + 1)


def make(job: dict[str, Any]) -> Any:
    """Builds a network of timm from the name of a model, or from a class and its options."""
    import timm

    if "model" in job:
        # Without initial weights, which take minutes for the largest networks.
        return timm.create_model(job["model"], pretrained=False, device="meta", **job["options"])
    if job["class"] == "MobileNetV3":
        blocks = timm.models._efficientnet_builder.decode_arch_def(job["blocks"])
        return timm.models.mobilenetv3.MobileNetV3(blocks, **job["options"])
    kind = {
        "VisionTransformer": timm.models.vision_transformer.VisionTransformer,
        "ConvNeXt": timm.models.convnext.ConvNeXt,
    }
    return kind[job["class"]](**job["options"])


def features(network: Any, images: np.ndarray, pooled: bool) -> np.ndarray:
    """Returns the features that this project uses, (batch, height, width, channels).

    Args:
      network: of timm.
      images: scaled, (batch, height, width, 3).
      pooled: whether these are the features that timm's classifier gets.
    """
    import torch

    with torch.inference_mode():
        output = network.forward_features(torch.from_numpy(images.transpose(0, 3, 1, 2)))
        if pooled:
            output = network.forward_head(output, pre_logits=True)
            return output.numpy()[:, np.newaxis, np.newaxis]
        if output.ndim == 4:
            return network.head.norm(output).numpy().transpose(0, 2, 3, 1)
        mean = output[:, network.num_prefix_tokens :].mean(dim=1)
        both = torch.cat([output[:, 0], mean], dim=1)
    return both.numpy()[:, np.newaxis, np.newaxis]


def run(folder: Path, job: dict[str, Any]) -> None:
    """Writes the weights and the features of a network."""
    import torch
    from safetensors.numpy import save_file

    network = make(job).eval()
    state = random_state({name: tuple(t.shape) for name, t in network.state_dict().items()})
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    network.load_state_dict(tensors, assign=True)
    save_file(state, folder / f"{job['name']}.safetensors")
    mean, deviation = (
        network.pretrained_cfg[key] if "model" in job else job[key] for key in ("mean", "std")
    )
    results: dict[str, Any] = {}
    for size in job["sizes"]:
        scaled = (photos(size) / 255 - np.array(mean)) / np.array(deviation)
        results[str(size)] = features(network, scaled.astype(np.float32), job["pooled"])
    np.savez(folder / f"{job['name']}.npz", **results)
    shapes = {name: value.shape for name, value in state.items()}
    (folder / f"{job['name']}.json").write_text(json.dumps(shapes))


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    for one in json.loads((directory / "job.json").read_text()):
        run(directory, one)
