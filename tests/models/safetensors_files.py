"""Writes files in the safetensors format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors of any supported type."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, value in tensors.items():
        end = begin + value.nbytes
        entry = {"dtype": TYPES[value.dtype.name], "shape": value.shape}
        header[name] = {**entry, "data_offsets": [begin, end]}
        begin = end
    write_parts(path, json.dumps(header), b"".join(value.tobytes() for value in tensors.values()))


def write_parts(path: Path, header: str, values: bytes) -> None:
    """Writes a file with a given header, which may be damaged."""
    content = header.encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + values)
