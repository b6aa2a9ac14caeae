"""podman and buildah for the system tests: settings and storage of their own, a base image made from Debian's packages,
and the image of the repository's Dockerfile, built once a session.

No registry is needed. What pip is set up with on this machine (an index, a folder of wheels, certificates) is given to
the build as secrets and read-only mounts, so nothing of it gets into the image.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

ROOT = Path(__file__).parents[2]
PROGRAMS = ("podman", "buildah", "runc", "mmdebstrap", "catatonit")
IMAGE = "localhost/rwkv-cluster:cpu"
BASE = "localhost/debian"
SUITE = "bookworm"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# crun of Debian 12 refuses hybrid cgroups; the default limits are above what some machines may set.
CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
base_hosts_file = "none"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
LIMITS = ("--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096")


class Engine:
    """podman with everything it keeps below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "containers.conf").write_text(CONTAINERS_CONF)
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/storage"\nrunroot = "{folder}/run"\n'
        )
        self.environment = {
            "CONTAINERS_CONF": f"{folder}/containers.conf",
            "CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf",
        }

    def __call__(self, *arguments: str, program: str = "podman", timeout_s: float = 60.0) -> str:
        """Standard output; fails with all of the output when the command does."""
        run = self.run(*arguments, program=program, timeout_s=timeout_s)
        assert run.returncode == 0, f"{program} {' '.join(arguments)}: {run.returncode}\n{run.stdout}{run.stderr}"
        return run.stdout

    def run(
        self, *arguments: str, program: str = "podman", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *arguments],
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def make_base(self) -> None:
        """Debian's smallest system, as the base image that a registry would hold."""
        archive = self.folder / "base.tar"
        mirror = ("--aptopt=Acquire::Check-Valid-Until false", SUITE, str(archive), "http://deb.debian.org/debian")
        self("--quiet", "--variant=minbase", *mirror, program="mmdebstrap", timeout_s=300)
        self("import", "--quiet", str(archive), BASE)
        archive.unlink()

    def build(self, context: Path = ROOT, *options: str) -> None:
        """Build the variant for CPUs from the context's Dockerfile."""
        arguments = {"BASE_IMAGE": BASE, "VARIANT": "cpu", "CUDA_VERSION": "none", "CUDA_ARCHITECTURES": ""}
        self(
            *("build", "--layers", "--format=docker", "--network=host", "--isolation=chroot", f"--tag={IMAGE}"),
            *(f"--build-arg={name}={value}" for name, value in arguments.items()),
            *_pip_of_this_machine(self.folder),
            *options,
            str(context),
            program="buildah",
            timeout_s=560,
        )

    def inspect(self, kind: str, name: str) -> Any:
        return json.loads(self(kind, "inspect", name))[0]

    def close(self) -> None:
        """Remove every container, image and network, and the storage."""
        self.run("rm", "--all", "--force", "--time=0")
        self.run("network", "prune", "--force")
        mounted = self.folder / "storage" / "overlay"
        subprocess.run(["umount", "--lazy", str(mounted)], capture_output=True, timeout=60)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    """An engine with the base image and the built one, which leaves nothing behind."""
    made = Engine(folder)
    try:
        made.make_base()
        made.build()
        yield made
    finally:
        made.close()


def reason_not_to(folder: Path) -> str | None:
    """Why containers cannot be run here, else None."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if os.getuid() != 0:
        return "building and running the image in these tests needs root"
    forbidden = subprocess.run(
        ["unshare", "--mount", "--pid", "--net", "--fork", "true"], capture_output=True, text=True
    )
    if forbidden.returncode:
        return f"this machine gives no namespaces: {forbidden.stderr.strip()}"
    tried = Engine(folder)
    try:
        made = tried.run("info")
        return None if made.returncode == 0 else f"podman does not work here: {made.stderr.strip()}"
    finally:
        tried.close()


def _pip_of_this_machine(folder: Path) -> Sequence[str]:
    """Options of a build: pip's settings as a secret, and the folders they name as mounts."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    settings: dict[str, str] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        key = name.strip(":").replace(":", ".").rpartition(".")[2]
        if key in ("index-url", "extra-index-url", "find-links", "trusted-host"):
            settings[key] = f"{settings.get(key, '')} {ast.literal_eval(value)}".strip()
    words = [word for value in settings.values() for word in value.split() if word.startswith(("/", "file:"))]
    places = {Path(urlparse(word).path) for word in words}
    places = {place.parent if place.name == "simple" else place for place in places}  # an index's files lie beside it
    options = [f"--volume={place}:{place}:ro" for place in sorted(places) if place.is_dir()]
    if CERTIFICATES.exists():
        settings["cert"] = "/run/ca.pem"
        options.append(f"--secret=id=ca.pem,src={CERTIFICATES}")
    (folder / "pip.conf").write_text("\n".join(["[global]", *(f"{key} = {value}" for key, value in settings.items())]))
    return [*options, f"--secret=id=pip.conf,src={folder}/pip.conf"]
