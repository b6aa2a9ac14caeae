"""podman and docker for the system tests: settings and storage of their own, a base image made from Debian's packages,
and the image of the repository's Dockerfile, built once a session.

No registry is needed. What pip is set up with on this machine (an index, a folder of wheels, certificates) is given to
the build as secrets, and folders among it by a web server of the build's own, so nothing of it gets into the image.
"""

from __future__ import annotations

import ast
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/rwkv-cluster:cpu"
BASE = "localhost/debian"
SUITE = "bookworm"
ARGUMENTS = {"BASE_IMAGE": BASE, "VARIANT": "cpu", "CUDA_VERSION": "none", "CUDA_ARCHITECTURES": ""}
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
    """podman, which builds with buildah, and everything that it keeps below `folder`."""

    program = "podman"
    needs = ("podman", "buildah", "runc", "mmdebstrap", "catatonit")

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

    def start(self) -> None:
        """Fails where it does not work."""
        self("info")

    def __call__(self, *arguments: str, program: str | None = None, timeout_s: float = 60.0) -> str:
        """Standard output; fails with all of the output when the command does."""
        run = self.run(*arguments, program=program, timeout_s=timeout_s)
        words = " ".join((program or self.program, *arguments))
        assert run.returncode == 0, f"{words}: {run.returncode}\n{run.stdout}{run.stderr}"
        return run.stdout

    def run(
        self, *arguments: str, program: str | None = None, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program or self.program, *arguments],
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
        self("import", str(archive), BASE)
        archive.unlink()

    def build(self, context: Path = ROOT, *, tag: str = IMAGE) -> None:
        """Build the variant for CPUs from the context's Dockerfile."""
        with _pip_of_this_machine(self.folder) as secrets:
            options = [f"--build-arg={name}={value}" for name, value in ARGUMENTS.items()]
            self._build(f"--tag={tag}", "--network=host", *options, *secrets, str(context))

    def _build(self, *options: str) -> None:
        self(
            *("build", "--layers", "--jobs=2", "--format=docker", "--isolation=chroot", *options),
            program="buildah",
            timeout_s=900,
        )

    def inspect(self, kind: str, name: str) -> Any:
        return json.loads(self(kind, "inspect", name))[0]

    def close(self) -> None:
        """Remove every container, image and network, and the storage."""
        if listed := self.run("ps", "--all", "--quiet").stdout.split():
            self.run("rm", "--force", *listed)
        self.run("network", "prune", "--force")
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self) -> None:
        mounted = self.folder / "storage" / "overlay"
        subprocess.run(["umount", "--lazy", str(mounted)], capture_output=True, timeout=60)


class Docker(Engine):
    """docker with a daemon of its own, which builds with BuildKit."""

    program = "docker"
    needs = ("docker", "dockerd", "docker-init", "mmdebstrap")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "DOCKER_HOST": f"unix://{folder}/docker.sock",
            "DOCKER_CONFIG": str(folder),
            "DOCKER_BUILDKIT": "1",
        }
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        places = [f"--{name}={self.folder}/{name}" for name in ("data-root", "exec-root", "pidfile")]
        with open(self.folder / "dockerd.log", "wb") as log:
            self._daemon = subprocess.Popen(
                ["dockerd", *places, f"--host={self.environment['DOCKER_HOST']}"], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 60
        while self.run("info").returncode:
            said = (self.folder / "dockerd.log").read_text()
            assert self._daemon.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)

    def _build(self, *options: str) -> None:
        self("build", *options, timeout_s=900)

    def _end(self) -> None:
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait(60)
        left = self.folder / "exec-root" / "netns" / "default"
        subprocess.run(["umount", str(left)], capture_output=True, timeout=60)


ENGINES = {engine.program: engine for engine in (Engine, Docker)}


@contextmanager
def engine(program: str, folder: Path) -> Iterator[Engine]:
    """An engine with the base image and the built one, which leaves nothing behind."""
    made = ENGINES[program](folder)
    try:
        made.start()
        made.make_base()
        made.build()
        yield made
    finally:
        made.close()


def reason_not_to(program: str, folder: Path) -> str | None:
    """Why containers cannot be run here, else None."""
    missing = [name for name in ENGINES[program].needs if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if os.getuid() != 0:
        return "building and running the image in these tests needs root"
    forbidden = subprocess.run(
        ["unshare", "--mount", "--pid", "--net", "--fork", "true"], capture_output=True, text=True
    )
    if forbidden.returncode:
        return f"this machine gives no namespaces: {forbidden.stderr.strip()}"
    tried = ENGINES[program](folder)
    try:
        tried.start()
    except AssertionError as error:
        return f"{program} does not work here: {error}"
    finally:
        tried.close()
    return None


@contextmanager
def _pip_of_this_machine(folder: Path) -> Iterator[list[str]]:
    """Options of a build that hand it pip's settings; the folders they name can be reached inside the block."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    settings: dict[str, list[str]] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        key = name.strip(":").replace(":", ".").rpartition(".")[2]
        if key in ("index-url", "extra-index-url", "find-links", "trusted-host"):
            settings.setdefault(key, []).extend(ast.literal_eval(value).split())
    served = folder / "served"
    served.mkdir(exist_ok=True)
    handler = partial(_Quiet, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            for words in settings.values():
                words[:] = [_served(word, served, address) for word in words]
            options = []
            if CERTIFICATES.exists():
                settings["cert"] = ["/run/ca.pem"]
                options.append(f"--secret=id=ca.pem,src={CERTIFICATES}")
            lines = [f"{key} = {' '.join(words)}" for key, words in settings.items()]
            (folder / "pip.conf").write_text("\n".join(["[global]", *lines]))
            yield [*options, f"--secret=id=pip.conf,src={folder}/pip.conf"]
        finally:
            server.shutdown()


def _served(word: str, served: Path, address: str) -> str:
    """A folder's address on the server, which finds it through a link in `served`; other words as they are."""
    if not word.startswith(("/", "file:")):
        return word
    place = Path(urlparse(word).path)
    root, end = (place.parent, f"/{place.name}") if place.name == "simple" else (place, "")  # its files lie beside it
    name = str(root).strip("/").replace("/", "-")
    if not (served / name).is_symlink():
        (served / name).symlink_to(root)
    return f"{address}/{name}{end}/"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass
