"""Compares networks of the table with timm: the same random weights, photos of two sizes.

python -m benchmarks.timm_reference                      # installs timm in a temporary folder
python -m benchmarks.timm_reference --python=PYTHON      # an interpreter that has timm

timm and PyTorch run in an environment of their own. timm writes its weights as safetensors, which
this project reads with `--weights`, so the names and shapes of the weights are compared too. The
preprocessing is that of timm's configuration and of the table of backbones.

The result also has the features of very small networks, which the tests compare with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import RESULTS, ROOT, print_table, write_result
from benchmarks.timm_forward import photos

NAME = "timm_reference"
PACKAGES = ("torch", "timm", "safetensors")
SIZES = ("atto", "femto", "pico", "nano", "tiny", "small", "medium", "base", "large", "huge")
KINDS = ("ViT", "DeiT", "DINOv2", "ConvNeXt", "MobileNetV4")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# The options are those of timm; the tests build the same networks of Keras layers.
SMALL_NETWORKS = (
    {
        "name": "small_vit",
        "class": "VisionTransformer",
        "options": {
            "img_size": 24,
            "patch_size": 8,
            "embed_dim": 128,
            "depth": 2,
            "num_heads": 2,
            "num_classes": 0,
            "dynamic_img_size": True,
        },
        "sizes": (24, 40),
        "pooled": False,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    },
    {
        "name": "small_dinov2",
        "class": "VisionTransformer",
        "options": {
            "img_size": 35,
            "patch_size": 7,
            "embed_dim": 64,
            "depth": 2,
            "num_heads": 1,
            "num_classes": 0,
            "init_values": 0.1,
            "reg_tokens": 4,
            "no_embed_class": True,
            "dynamic_img_size": True,
        },
        "sizes": (35, 21),
        "pooled": False,
        **IMAGENET,
    },
    {
        "name": "small_convnext",
        "class": "ConvNeXt",
        "options": {"dims": (4, 8, 12, 16), "depths": (3, 3, 9, 3), "num_classes": 0},
        "sizes": (32, 64),
        "pooled": False,
        **IMAGENET,
    },
    {
        "name": "small_convnext_v2",
        "class": "ConvNeXt",
        "options": {
            "dims": (8, 16, 24, 32),
            "depths": (1, 1, 2, 1),
            "use_grn": True,
            "ls_init_value": None,
            "conv_mlp": True,
            "num_classes": 0,
        },
        "sizes": (32, 75),
        "pooled": True,
        **IMAGENET,
    },
    {
        "name": "small_mobilenet_v4",
        "class": "MobileNetV3",
        "blocks": (
            ("cn_r1_k3_s2_e1_c16", "cn_r1_k1_s1_e1_c8"),
            ("er_r1_k3_s2_e4_c8",),
            ("uir_r1_a5_k3_s2_e2_c16", "uir_r1_a0_k0_s1_e2_c16"),
            ("uir_r1_a3_k0_s2_e2_c16", "uir_r1_a0_k5_s1_e4_c16"),
            ("cn_r1_k1_s1_c24",),
        ),
        "options": {"stem_size": 8, "num_features": 1280, "head_norm": True, "num_classes": 0},
        "sizes": (64, 75),
        "pooled": True,
        **IMAGENET,
    },
)


def timm_name(backbone: str) -> str:
    """Returns the name of a backbone in timm, such as vit_small_patch14_reg4_dinov2."""
    pixels = "384" if backbone.endswith("384") else "224"
    size = next(size for size in SIZES if size.title() in backbone)
    if backbone.startswith("DINOv2"):
        return f"vit_{size}_patch14_{'reg4_' * backbone.endswith('Registers')}dinov2"
    if backbone.startswith("ConvNeXt"):
        version = "v2" if backbone.startswith("ConvNeXtV2") else ""
        return f"convnext{version}_{'x' * ('XLarge' in backbone)}{size}"
    if backbone.startswith("MobileNetV4"):
        return f"mobilenetv4_conv_{size}"
    kind = next(kind for kind in ("DeiT3", "DeiT", "ViT") if backbone.startswith(kind))
    return f"{kind.lower()}_{size}_patch16_{pixels}"


def job_of(backbone: str) -> dict[str, Any]:
    """Returns what timm computes for a backbone, at the pretrained size and at a smaller one."""
    is_transformer = backbone.startswith(("ViT", "DeiT", "DINOv2"))
    sizes = (518, 224) if backbone.startswith("DINOv2") else (224, 160)
    return {
        "name": backbone,
        "model": timm_name(backbone),
        "options": {"dynamic_img_size": True} if is_transformer else {},
        "sizes": (384, 256) if backbone.endswith("384") else sizes,
        "pooled": backbone.startswith(("ConvNeXtV2", "MobileNetV4")),
    }


def run_timm(python: str, folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Runs jobs where timm is installed; the results are in the folder."""
    (folder / "job.json").write_text(json.dumps(jobs))
    program = str(ROOT / "benchmarks" / "timm_forward.py")
    subprocess.run([python, program, str(folder)], check=True)


def deviation(backbone: str, folder: Path, size: int, wanted: np.ndarray) -> float:
    """Returns the largest deviation of a backbone's features, relative to the largest value."""
    import keras
    import tensorflow as tf

    from research.models.backbone import build_backbone
    from research.models.backbone_table import find_backbone
    from research.models.weights import load_weights

    keras.backend.clear_session()  # the largest networks need gigabytes
    entry = find_backbone(backbone)
    model = build_backbone(entry, size, None)
    load_weights(model, str(folder / f"{backbone}.safetensors"))
    # Outside of a tf.function, the outputs of all layers are kept.
    compute = tf.function(model, autograph=False)
    found = np.asarray(compute(entry.preprocessing(photos(size))))
    wanted = wanted[..., : found.shape[-1]]  # timm returns the mean of the tokens too
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--python", help="interpreter with timm; default: timm is installed")
    parser.add_argument(
        "--backbones", nargs="*", help="default: all that timm has; others keep results"
    )
    arguments = parser.parse_args()
    from research.system.environment import import_tensorflow

    import_tensorflow()
    from research.models.backbone_table import BACKBONES

    names = arguments.backbones or [name for name in BACKBONES if name.startswith(KINDS)]
    earlier = RESULTS / f"{NAME}.json"
    rows: list[dict[str, Any]] = json.loads(earlier.read_text())["rows"] if earlier.exists() else []
    rows = [row for row in rows if row["backbone"] not in names]
    small: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, python = Path(temporary), arguments.python
        if python is None:
            venv.create(folder / "timm", with_pip=True)
            python = str(folder / "timm" / "bin" / "python")
            subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        run_timm(python, folder, [dict(job) for job in SMALL_NETWORKS])
        for job in SMALL_NETWORKS:
            results = np.load(folder / f"{job['name']}.npz")
            shapes = json.loads((folder / f"{job['name']}.json").read_text())
            small[str(job["name"])] = {
                "tensors": {name: " ".join(map(str, shape)) for name, shape in shapes.items()},
                "features": {
                    size: " ".join(f"{value:.7g}" for value in results[size].ravel())
                    for size in results.files
                },
            }
        for name in names:
            run_timm(python, folder, [job_of(name)])
            results = np.load(folder / f"{name}.npz")
            for size in map(int, results.files):
                relative = deviation(name, folder, size, results[str(size)])
                rows.append({"backbone": name, "timm": timm_name(name), "size": size})
                rows[-1]["deviation"] = relative
                print(rows[-1], file=sys.stderr, flush=True)
            (folder / f"{name}.safetensors").unlink()
            # A run takes long: if it is stopped, the rows so far are kept.
            write_result(NAME, {"rows": rows, "small_networks": small})
    print_table(rows)


if __name__ == "__main__":
    main()
