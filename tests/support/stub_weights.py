"""Weights of a released size of which only the header takes place: their bytes are a hole in the file."""

from __future__ import annotations

import json
import math
from pathlib import Path

from rwkv_cluster.config.recipes import find_config
from rwkv_cluster.model.parameter_shapes import parameter_shapes


def write_stub(path: Path, size: str) -> Path:
    """Safetensors at `path` with the shapes of the released `size`, such as 0.4b, in bf16."""
    model = find_config(f"sizes/{size}.yaml").resolved.config.model
    entries, end = {}, 0
    for name, shape in parameter_shapes(model, 65536).items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path
