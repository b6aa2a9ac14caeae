"""What the container image was built from."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rwkv_cluster.doctor.context import IMAGE_VARIABLE, CheckContext
from rwkv_cluster.doctor.results import Row, ok, warning


def image(context: CheckContext) -> list[Row]:
    """Nothing outside of one."""
    described = os.environ.get(IMAGE_VARIABLE)
    if not described:
        return []
    try:
        contents = json.loads(Path(described).read_text())
        kernels = [" ".join([target, *names]) for target, names in contents["kernels"].items()]
        return [
            ok("image", f"variant {contents['variant']}, revision {contents['revision']}"),
            ok("image: WKV kernels", ", ".join(kernels) or "none"),
            ok("image: packages", f"{contents['packages']}, listed in {contents['sbom']}"),
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        text = f"{described}, which {IMAGE_VARIABLE} names, cannot be read: {error!r}"
        return [warning("image", text, "Build the image from this package's Dockerfile")]
