"""A Kubernetes without nodes: etcd, an API server and the controllers of jobs.

The programs are those of the folder that KUBEBUILDER_ASSETS names, as Kubernetes' own projects test with them. A test
has the kubelet's part: it says what has become of a pod.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system.processes import free_port, wait_until

ASSETS = os.environ.get("KUBEBUILDER_ASSETS", "")
TOKEN = "token"


def program(name: str) -> str | None:
    """Path of one of Kubernetes' programs."""
    return shutil.which(name, path=f"{ASSETS}:{os.environ['PATH']}")


PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl", "openssl")
MISSING = [name for name in PROGRAMS if program(name) is None]


@dataclass(frozen=True)
class Cluster:
    """config: file for KUBECONFIG."""

    config: Path

    def kubectl(self, *words: str) -> str:
        """What kubectl prints."""
        argv = [str(program("kubectl")), f"--kubeconfig={self.config}", *words]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}"
        return done.stdout

    def get(self, *words: str) -> Any:
        """Objects as the cluster has them."""
        return json.loads(self.kubectl("get", *words, "--output=json"))

    def end_pod(self, name: str, code: int) -> None:
        """Say that a pod has ended, as its kubelet would."""
        phase = "Failed" if code else "Succeeded"
        times = {"startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:00:01Z"}
        ended = {"name": "main", "image": "x", "imageID": "x", "ready": False, "restartCount": 0}
        status = {
            "phase": phase,
            "containerStatuses": [{**ended, "state": {"terminated": {"exitCode": code, **times}}}],
        }
        self.kubectl("patch", "pod", name, "--subresource=status", "--patch", json.dumps({"status": status}))


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """The cluster, gone after the block."""
    store, peer, port = free_port(), free_port(), free_port()
    (folder / "tokens.csv").write_text(f'{TOKEN},admin,admin,"system:masters"\n')
    subprocess.run(["openssl", "genrsa", "-out", folder / "key.pem", "2048"], check=True, capture_output=True)
    config = folder / "kubeconfig"
    server = {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}
    config.write_text(
        json.dumps({
            "clusters": [{"name": "test", "cluster": server}],
            "users": [{"name": "test", "user": {"token": TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        })
    )  # fmt: skip
    etcd = f"http://127.0.0.1:{store}"
    with ExitStack() as stack:

        def start(name: str, *options: str) -> None:
            with open(folder / f"{name}.log", "wb") as log:
                process = subprocess.Popen([str(program(name)), *options], stdout=log, stderr=log, cwd=folder)
            stack.callback(process.wait)
            stack.callback(process.kill)

        start("etcd", f"--data-dir={folder}/etcd", f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}",
              f"--listen-peer-urls=http://127.0.0.1:{peer}", "--unsafe-no-fsync")  # fmt: skip
        start("kube-apiserver", f"--etcd-servers={etcd}", f"--secure-port={port}", f"--cert-dir={folder}/certificates",
              "--bind-address=127.0.0.1", "--service-cluster-ip-range=10.0.0.0/24", "--authorization-mode=AlwaysAllow",
              f"--token-auth-file={folder}/tokens.csv", "--service-account-issuer=https://test",
              f"--service-account-key-file={folder}/key.pem", f"--service-account-signing-key-file={folder}/key.pem",
              "--disable-admission-plugins=ServiceAccount")  # fmt: skip
        made = Cluster(config)

        def answers() -> bool:
            argv = [str(program("kubectl")), f"--kubeconfig={config}", "get"]
            asks = (["namespaces", "default"], ["--raw=/openapi/v2"])  # by which kubectl checks manifests
            return all(subprocess.run([*argv, *ask], capture_output=True, timeout=60).returncode == 0 for ask in asks)

        wait_until(answers, what=f"the API server, see {folder}/kube-apiserver.log")
        start("kube-controller-manager", f"--kubeconfig={config}", "--leader-elect=false", "--secure-port=0",
              "--controllers=job-controller,garbage-collector-controller")  # fmt: skip
        yield made
