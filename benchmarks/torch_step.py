"""Training steps of PyTorch and timm; `train_step.py --peer=torch` starts it and asks for them.

python benchmarks/torch_step.py BACKBONE PRECISION BATCH_SIZE

The interpreter needs torch and timm, not TensorFlow. The program builds the network, prints
`ready`, and then makes steps for each line that it reads: their number and their kind. It prints
the seconds of a step; for `matrix product`, the operations per second; for `memory`, the bytes that
the last steps needed besides weights and photos.

The step is what a PyTorch user writes who wants speed: memory format channels_last, autocast for
bfloat16 and float16, no gradients in the frozen layers. They are the layers before layer 100 of the
Keras network. On a GPU, the network is compiled with `torch.compile`, products in float32 may use
TF32 as in TensorFlow, and the photos are in its memory.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch

IMAGE_SIZE = 160
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The model of timm with the same blocks, and the number of its blocks before layer 100 of Keras.
# Layer 100 of ResNet101V2 is in the second block of the third stage.
NETWORKS = {"MobileNetV2": ("mobilenetv2_100", 11), "ResNet101V2": ("resnet101", 8)}
# The kinds of step: whether BatchNorm is in training mode, and the mode of torch.compile.
KINDS: dict[str, tuple[bool, str | None]] = {
    "torch, BatchNorm frozen": (False, None),
    "torch, BatchNorm training": (True, None),
}
KINDS_ON_GPUS: dict[str, tuple[bool, str | None]] = {
    "torch, BatchNorm frozen": (False, "default"),
    "torch, BatchNorm training": (True, "default"),
    "torch, BatchNorm frozen, CUDA graphs": (False, "reduce-overhead"),
}


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


def training_step(
    network: Parted, precision: str, batch_size: int, batch_norm_training: bool, mode: str | None
) -> Callable[[], None]:
    """Returns a function that makes a step.

    Args:
      network: on `DEVICE`.
      precision: `float32`, `bfloat16` or `float16`.
      batch_size: photos per step.
      batch_norm_training: whether BatchNorm is in training mode in the trained layers.
      mode: of `torch.compile`; None does not compile.
    """
    optimizer = torch.optim.RMSprop(
        [value for value in network.parameters() if value.requires_grad], lr=1e-4
    )
    scaler = torch.amp.GradScaler(DEVICE, enabled=precision == "float16")
    loss = torch.nn.BCEWithLogitsLoss()
    photos = torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=DEVICE) * 2 - 1
    photos = photos.to(memory_format=torch.channels_last)
    labels = (torch.arange(batch_size, device=DEVICE) % 2).float()[:, None]

    def loss_of_batch() -> torch.Tensor:
        dtype = getattr(torch, precision)
        with torch.autocast(DEVICE, dtype, enabled=precision != "float32"):
            logits = network(photos)
        return loss(logits.float(), labels)

    compute = torch.compile(loss_of_batch, mode=mode) if mode else loss_of_batch

    def step() -> None:
        network.eval()
        network.trained.train(batch_norm_training)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(compute()).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def wait() -> None:
    """Waits until the GPU has done everything."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def matrix_product_rate(precision: str, size: int = 2048, repeats: int = 10) -> float:
    """Returns the operations per second of a product of two square matrices."""
    matrix = torch.rand(size, size, dtype=getattr(torch, precision), device=DEVICE)
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        matrix @ matrix
        wait()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / statistics.median(seconds[1:])


def main() -> None:
    """Answers each line of standard input."""
    backbone, precision, batch_size = sys.argv[1:]
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    network = Parted(*NETWORKS[backbone]).to(DEVICE, memory_format=torch.channels_last)
    steps = {
        kind: training_step(network, precision, int(batch_size), *options)
        for kind, options in (KINDS_ON_GPUS if DEVICE == "cuda" else KINDS).items()
    }
    if DEVICE == "cuda":
        for step in steps.values():
            step()  # compiles
    memory = 0
    print("ready", flush=True)
    for line in sys.stdin:
        count, _, kind = line.strip().partition(" ")
        if kind == "matrix product":
            print(matrix_product_rate(precision), flush=True)
            continue
        if kind == "memory":
            print(memory, flush=True)
            continue
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        wait()
        begin = time.perf_counter()
        for _ in range(int(count)):
            steps[kind]()
        wait()
        seconds = (time.perf_counter() - begin) / int(count)
        if DEVICE == "cuda":
            memory = torch.cuda.max_memory_allocated() - before
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
