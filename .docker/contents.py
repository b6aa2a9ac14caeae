"""Write what the image holds: contents.json for `rwkv-cluster doctor`, and a CycloneDX bill of materials beside it.

Run at the end of the image's build, by the image's own Python: `contents.py FOLDER REVISION VARIANT`.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path


def python_packages() -> list[dict[str, object]]:
    found = []
    for package in importlib.metadata.distributions():
        name, version = package.metadata["Name"], package.version
        url = f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
        found.append({"type": "library", "name": name, "version": version, "purl": url, "bom-ref": url})
    return found


def debian_packages() -> list[dict[str, object]]:
    listed = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package} ${Version} ${Architecture}\n"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = []
    for line in listed.splitlines():
        name, version, architecture = line.split()
        url = f"pkg:deb/debian/{name}@{version}?arch={architecture}"
        found.append({"type": "library", "name": name, "version": version, "purl": url, "bom-ref": url})
    return found


def main(folder: Path, revision: str, variant: str) -> None:
    components = sorted([*python_packages(), *debian_packages()], key=lambda component: str(component["purl"]))
    bill = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}
    (folder / "sbom.cdx.json").write_text(json.dumps(bill, indent=1) + "\n")
    manifests = [json.loads(path.read_text()) for path in sorted((folder.parent / "kernels").glob("wkv_*.json"))]
    contents = {
        "revision": revision,
        "variant": variant,
        "kernels": {manifest["target"]: manifest["architectures"] for manifest in manifests},
        "compilers": {manifest["target"]: manifest["compiler"] for manifest in manifests},
        "packages": len(components),
        "sbom": str(folder / "sbom.cdx.json"),
    }
    (folder / "contents.json").write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
