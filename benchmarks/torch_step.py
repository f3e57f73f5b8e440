"""Training steps of PyTorch and timm; `train_step.py --peer=torch` starts it and asks for them.

python benchmarks/torch_step.py BACKBONE PRECISION

The interpreter needs torch and timm, not TensorFlow. The program builds the network, prints
`ready`, and then makes a step for each line that it reads: the name of a kind of step. It prints
the seconds of the step; for `matrix product`, the operations per second.

The step is what a PyTorch user writes who wants speed: memory format channels_last, autocast for
bfloat16, no gradients in the frozen layers. They are the layers before layer 100 of the Keras
network.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch

IMAGE_SIZE, BATCH_SIZE = 160, 32
# The model of timm with the same blocks, and the number of its blocks before layer 100 of Keras.
# Layer 100 of ResNet101V2 is in the second block of the third stage.
NETWORKS = {"MobileNetV2": ("mobilenetv2_100", 11), "ResNet101V2": ("resnet101", 8)}
KINDS = {"torch, BatchNorm frozen": False, "torch, BatchNorm training": True}


class Parted(torch.nn.Module):
    """A network of timm in two parts, with a classifier for two classes.

    Args:
      name: of a model of timm.
      frozen_blocks: number of blocks that are not trained. The stem is not trained either.
    """

    def __init__(self, name: str, frozen_blocks: int) -> None:
        super().__init__()
        network = timm.create_model(name, num_classes=1)
        if hasattr(network, "blocks"):
            blocks = [block for stage in network.blocks for block in stage]
            stem = [network.conv_stem, network.bn1]
            end = [network.conv_head, network.bn2, network.global_pool, network.classifier]
        else:
            stages = (network.layer1, network.layer2, network.layer3, network.layer4)
            blocks = [block for stage in stages for block in stage]
            stem = [network.conv1, network.bn1, network.act1, network.maxpool]
            end = [network.global_pool, network.fc]
        self.frozen = torch.nn.Sequential(*stem, *blocks[:frozen_blocks])
        self.trained = torch.nn.Sequential(*blocks[frozen_blocks:], *end)
        self.frozen.requires_grad_(False)

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        """Returns the logits, (batch, 1), of photos, float32 (batch, 3, height, width)."""
        with torch.no_grad():
            features = self.frozen(photos)
        return self.trained(features)


def training_step(network: Parted, precision: str) -> Callable[[bool], None]:
    """Returns a function that makes a step; its argument: whether BatchNorm is in training mode."""
    optimizer = torch.optim.RMSprop(
        [value for value in network.parameters() if value.requires_grad], lr=1e-4
    )
    loss = torch.nn.BCEWithLogitsLoss()
    photos = torch.rand(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1
    photos = photos.to(memory_format=torch.channels_last)
    labels = (torch.arange(BATCH_SIZE) % 2).float()[:, None]

    def step(batch_norm_training: bool) -> None:
        network.eval()
        network.trained.train(batch_norm_training)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = network(photos)
        loss(logits.float(), labels).backward()
        optimizer.step()

    return step


def matrix_product_rate(precision: str, size: int = 2048, repeats: int = 10) -> float:
    """Returns the operations per second of a product of two square matrices."""
    matrix = torch.rand(size, size, dtype=getattr(torch, precision))
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / statistics.median(seconds[1:])


def main() -> None:
    """Answers each line of standard input."""
    backbone, precision = sys.argv[1:]
    torch.manual_seed(0)
    network = Parted(*NETWORKS[backbone]).to(memory_format=torch.channels_last)
    step = training_step(network, precision)
    print("ready", flush=True)
    for line in sys.stdin:
        kind = line.strip()
        if kind == "matrix product":
            print(matrix_product_rate(precision), flush=True)
            continue
        begin = time.perf_counter()
        step(KINDS[kind])
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
