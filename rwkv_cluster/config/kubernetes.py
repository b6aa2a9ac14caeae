"""The sections `launch.kubernetes` and `launch.skypilot`: where pods or machines are asked for, and what they get.

Their values reach manifests and kubectl's command line, so each accepts what Kubernetes accepts in its place.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from pydantic import Field, field_validator

from rwkv_cluster.config.section import Section
from rwkv_cluster.runtime.terminal.plain_text import hidden_character

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_OBJECT = re.compile(rf"{_LABEL}(\.{_LABEL}){{0,8}}")
_CONTEXT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/@-]{0,252}")
_KEY = re.compile(rf"({_LABEL}(\.{_LABEL}){{0,8}}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{{0,61}}[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_SECRET = re.compile(rf"{_LABEL}(\.{_LABEL}){{0,8}}/[A-Za-z0-9_.-]{{1,253}}")
_DEVICE = "a name such as nvidia.com/gpu"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USER = re.compile(r"\d{1,9}:\d{1,9}")
_INFRA = re.compile(r"[a-z0-9]([a-z0-9/*._-]{0,99})")
_ACCELERATOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


OWN_MOUNTS = ("/dev/shm", "/etc/rwkv-cluster")
"""Shared memory and the run's file, in each pod."""


class Volume(NamedTuple):
    """A claim, or a volume of SkyPilot's, and where it is mounted."""

    name: str
    path: str
    read_only: bool = False

    def holds(self, path: str) -> bool:
        """Whether an absolute path lies in it."""
        return path == self.path or path.startswith(self.path.rstrip("/") + "/")


def volume(text: str) -> Volume:
    """NAME:PATH or NAME:PATH:ro as its parts. Raises ValueError."""
    name, *rest = text.split(":")
    sound = _OBJECT.fullmatch(name) and rest[1:] in ([], ["ro"]) and rest and rest[0].startswith("/")
    if not sound or hidden_character(text) or ".." in rest[0].split("/") or rest[0] == "/":
        raise ValueError(
            f"volumes has {text[:80]!a}. Write NAME:PATH or NAME:PATH:ro, with the name of a claim and an absolute path"
        )
    return Volume(name, rest[0].rstrip("/"), len(rest) == 2)


class KubernetesConfig(Section):
    """Target kubernetes: the cluster, and what the pods are given. One pod for each node."""

    kind: Literal["job", "jobset", "pytorchjob"] = Field(
        "job", description="what is made: job (an indexed Job, in every cluster), jobset (where JobSet is installed) "
        "or pytorchjob (Kubeflow's training operator)"
    )  # fmt: skip
    context: str | None = Field(None, description="context of kubectl's configuration; default: the current one")
    namespace: str | None = Field(None, description="namespace; default: the context's")
    volumes: list[str] = Field(
        default_factory=list, description="claims that all pods share, each CLAIM:PATH or CLAIM:PATH:ro; one of them "
        "holds the work directory"
    )  # fmt: skip
    secrets: dict[str, str] = Field(
        default_factory=dict, description="environment variables from secrets of the cluster, each as SECRET/KEY, "
        "such as {WANDB_API_KEY: wandb/key}"
    )  # fmt: skip
    pull_secrets: list[str] = Field(default_factory=list, description="secrets with which the image is pulled")
    run_as: str | None = Field(
        None, description="user and group of the pods, UID:GID, who own what the run writes; default: the image's"
    )
    max_failures: int = Field(
        3, ge=0, le=10_000, description="start the pods again at most this often after failures that are neither "
        "preemptions nor mistakes"
    )  # fmt: skip
    start_s: int = Field(
        1800, ge=1, le=1_000_000, description="seconds that pods which run wait for those that do not yet"
    )
    gpu_resource: str = Field("nvidia.com/gpu", description="name of the resource that gpus_per_node asks for")
    resources: dict[str, int] = Field(
        default_factory=dict, description="further devices of each pod, such as {rdma/hca: 1}"
    )
    node_selector: dict[str, str] = Field(default_factory=dict, description="labels that a node must have")
    tolerations: list[str] = Field(default_factory=list, description="keys of taints that the pods tolerate")
    priority_class: str | None = Field(None, description="priority class of the pods")
    queue: str | None = Field(None, description="Kueue's local queue, which admits all pods together")

    @field_validator("namespace", "priority_class", "queue")
    @classmethod
    def _objects(cls, value: str | None, info: object) -> str | None:
        return None if value is None else _checked(value, _OBJECT, _field(info), "a name of Kubernetes: a-z, 0-9, -")

    @field_validator("context")
    @classmethod
    def _context(cls, value: str | None) -> str | None:
        return None if value is None else _checked(value, _CONTEXT, "context", "a name that `kubectl config` lists")

    @field_validator("volumes")
    @classmethod
    def _volumes(cls, value: list[str]) -> list[str]:
        paths = [volume(text).path for text in value]
        _refuse_twice(paths)
        if taken := sorted({*OWN_MOUNTS} & {*paths}):
            raise ValueError(f"volumes mounts a claim at {taken[0]}, which each pod has already. Choose another path")
        return value

    @field_validator("secrets")
    @classmethod
    def _secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name, reference in value.items():
            _checked(name, _VARIABLE, "secrets", "the name of an environment variable")
            if not _SECRET.fullmatch(reference):  # which may be the secret itself
                raise ValueError(
                    f"secrets.{name} is no reference to a secret. Write SECRET/KEY, the name of a secret of the "
                    "cluster and a key in it, never the value"
                )
        return value

    @field_validator("pull_secrets")
    @classmethod
    def _pull_secrets(cls, value: list[str]) -> list[str]:
        return [_checked(name, _OBJECT, "pull_secrets", "the names of secrets") for name in value]

    @field_validator("run_as")
    @classmethod
    def _run_as(cls, value: str | None) -> str | None:
        return None if value is None else _checked(value, _USER, "run_as", "numbers, UID:GID, such as 1000:1000")

    @field_validator("gpu_resource")
    @classmethod
    def _gpu_resource(cls, value: str) -> str:
        if "/" not in _checked(value, _KEY, "gpu_resource", _DEVICE):
            raise ValueError(f"gpu_resource has {value!a}. Use {_DEVICE}")
        return value

    @field_validator("resources")
    @classmethod
    def _resources(cls, value: dict[str, int]) -> dict[str, int]:
        for name, amount in value.items():
            if "/" not in _checked(name, _KEY, "resources", "names such as rdma/hca") or amount < 1:
                raise ValueError(
                    f"resources has {name}: {amount}. Name devices, such as rdma/hca, with numbers from 1; memory, "
                    "CPUs and GPUs are launch.mem, cpus_per_node and gpus_per_node"
                )
        return value

    @field_validator("node_selector")
    @classmethod
    def _node_selector(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            _checked(name, _KEY, "node_selector", "keys of labels")
            _checked(text, _VALUE, f"node_selector.{name}", "the value of a label")
        return value

    @field_validator("tolerations")
    @classmethod
    def _tolerations(cls, value: list[str]) -> list[str]:
        return [_checked(key, _KEY, "tolerations", "keys of taints, such as nvidia.com/gpu") for key in value]


class SkypilotConfig(Section):
    """Target skypilot: a task file for `sky`, which --dry-run prints."""

    accelerator: str | None = Field(None, description="name of the GPU, such as H100")
    infra: str | None = Field(None, description="where, such as kubernetes or aws/us-east-1; default: the cheapest")
    spot: bool = Field(False, description="machines that may be taken away")
    volumes: list[str] = Field(
        default_factory=list, description="SkyPilot's volumes that all machines share, each NAME:PATH"
    )

    @field_validator("accelerator")
    @classmethod
    def _accelerator(cls, value: str | None) -> str | None:
        return None if value is None else _checked(value, _ACCELERATOR, "accelerator", "a name such as H100")

    @field_validator("infra")
    @classmethod
    def _infra(cls, value: str | None) -> str | None:
        return None if value is None else _checked(value, _INFRA, "infra", "a place such as aws/us-east-1")

    @field_validator("volumes")
    @classmethod
    def _volumes(cls, value: list[str]) -> list[str]:
        for text in value:
            if volume(text).read_only:
                raise ValueError(f"volumes has {text[:80]!a}. SkyPilot mounts volumes for writing: write NAME:PATH")
        _refuse_twice([volume(text).path for text in value])
        return value


def _refuse_twice(paths: list[str]) -> None:
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"volumes mounts two volumes at {path}. Choose another path")


def _field(info: object) -> str:
    return str(getattr(info, "field_name", ""))


def _checked(value: str, pattern: re.Pattern[str], field: str, expected: str) -> str:
    if not pattern.fullmatch(value):
        raise ValueError(f"{field} has {value[:80]!a}. Use {expected}")
    return value
