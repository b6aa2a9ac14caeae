"""The manifests of a launch on Kubernetes: a pod for each node, which runs the agent, and what the pods share.

A pod is never restarted in place. Which pods are made again after they have failed, and which end the job, their exit
code decides: the agent's, which is the trainer's, but RESTART_CODE after a signal to end, for that is how Kubernetes
takes a node away. Rank 0 prepares the data while the others wait, as everywhere: an init container would hold the same
GPUs, and would run in each pod. A job of its own, without GPUs, needs somebody who starts training after it: JobSet.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from rwkv_cluster.config import Config
from rwkv_cluster.config.kubernetes import OWN_MOUNTS, volume
from rwkv_cluster.config.loader import dump_yaml
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.launch import launch_folder
from rwkv_cluster.launch.launchers.rank_command import interpreter, joined_torchrun
from rwkv_cluster.launch.outcome import MISTAKES
from rwkv_cluster.workdir import WorkDir

RUN_LABEL = "rwkv-cluster/run"
RESTART_CODE = 143  # 128 + SIGTERM; PyTorchJob restarts nothing below 128
PREEMPTED = 75  # a STOP file, where RESTART_CODE is that of a signal
SHARED_MEMORY, CONFIG_FOLDER = OWN_MOUNTS
RESOURCES = {"job": "jobs.batch", "jobset": "jobsets.jobset.x-k8s.io", "pytorchjob": "pytorchjobs.kubeflow.org"}
MAIN = {"job": "main", "jobset": "main", "pytorchjob": "pytorch"}  # the training operator looks for this name

Manifest = dict[str, Any]


def object_name(config: Config) -> str:
    """Name of all that a launch makes: launch.name as Kubernetes allows it, and what tells work directories apart.

    A work directory has one run at a time, and so one name.
    """
    words = re.sub(r"[^a-z0-9]+", "-", config.launch.name.lower()).strip("-")
    name = words if words[:1].isalpha() else f"run-{words}"
    digest = hashlib.sha256("\0".join([config.work_dir, *config.launch.kubernetes.volumes]).encode())
    return f"{name[:30].rstrip('-')}-{digest.hexdigest()[:8]}"


def manifests(config: Config, cwd: str, verb: str) -> str:
    """All objects of a launch, as YAML documents. Raises ConfigError.

    cwd: where the caller stands. verb: what the ranks run, train or doctor.
    """
    _require_volumes(config, cwd)
    name, kind = object_name(config), config.launch.kubernetes.kind
    documents = [_config_map(config, name)]
    if kind == "job":  # the others make their own
        documents.append(_service(name))
    documents.append({"job": _job, "jobset": _jobset, "pytorchjob": _pytorchjob}[kind](config, cwd, verb))
    return yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def node_names(config: Config) -> list[str]:
    """Names by which the pods find each other; the first one is where the ranks meet."""
    name, n = object_name(config), config.launch.num_nodes
    if config.launch.kubernetes.kind == "pytorchjob":
        return [f"{name}-master-0", *(f"{name}-worker-{index}" for index in range(n - 1))]
    pods = f"{name}-train-0" if config.launch.kubernetes.kind == "jobset" else name
    return [f"{pods}-{index}.{name}" for index in range(n)]


def _require_volumes(config: Config, cwd: str) -> None:
    """Raise ConfigError where the pods would not find the work directory, or an input that is here."""
    volumes = [volume(text) for text in config.launch.kubernetes.volumes]
    if not any(each.holds(config.work_dir) and not each.read_only for each in volumes):
        raise ConfigError(
            f"work_dir is {config.work_dir}, which lies in no volume that pods may write: launch.kubernetes.volumes is "
            f"{', '.join(config.launch.kubernetes.volumes)}",
            remedy="Mount a claim at it, or above it",
        )
    paths = [("data.inputs", path) for path in config.data.inputs]
    paths += [("training.init_from", config.training.init_from)] if config.training.init_from else []
    for field, path in paths:
        here = os.path.abspath(os.path.join(cwd, path))
        if os.path.exists(here) and not any(each.holds(here) for each in volumes):
            raise ConfigError(
                f"{field} has {path}, which is {here} here and lies in no volume of launch.kubernetes.volumes",
                remedy="Copy it into one, and name it by its path there",
            )


def _config_map(config: Config, name: str) -> Manifest:
    data = {launch_folder.CONFIG: dump_yaml(config)}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(config, name), "data": data}


def _service(name: str) -> Manifest:
    """The headless service by which pods have names, from their first moment on."""
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {RUN_LABEL: name}}
    metadata = {"name": name, "labels": {RUN_LABEL: name}}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def _job(config: Config, cwd: str, verb: str) -> Manifest:
    name = object_name(config)
    spec = _job_spec(config, _training_pod(config, cwd, verb, "JOB_COMPLETION_INDEX") | {"subdomain": name})
    metadata = _metadata(config, name, with_queue=True)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def _jobset(config: Config, cwd: str, verb: str) -> Manifest:
    name, prepare = object_name(config), config.launch.prepare.own_job
    train: Manifest = {"name": "train", "replicas": 1}
    if prepare:
        train["dependsOn"] = [{"name": "prepare", "status": "Complete"}]
    train["template"] = {"spec": _job_spec(config, _training_pod(config, cwd, verb, "JOB_COMPLETION_INDEX"), limit=0)}
    first = {"name": "prepare", "replicas": 1, "template": {"spec": _prepare_spec(config, cwd)}}
    mistakes = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    again = config.launch.kubernetes.max_failures if config.launch.requeue else 0
    spec = {
        "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": again, "rules": [mistakes]},
        "replicatedJobs": [first, train] if prepare else [train],
    }
    metadata = _metadata(config, name, with_queue=True)
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def _pytorchjob(config: Config, cwd: str, verb: str) -> Manifest:
    """Kubeflow's form, which starts pods again by their exit code: from 128 on."""
    template = _template(config, _training_pod(config, cwd, verb, "RANK"))
    policy = "ExitCode" if config.launch.requeue else "Never"
    replicas = {"Master": {"replicas": 1, "restartPolicy": policy, "template": template}}
    if config.launch.num_nodes > 1:
        workers = {"replicas": config.launch.num_nodes - 1, "restartPolicy": policy, "template": template}
        replicas["Worker"] = workers
    spec = {"runPolicy": {"cleanPodPolicy": "None"}, "pytorchReplicaSpecs": replicas}
    metadata = _metadata(config, object_name(config), with_queue=True)
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": metadata, "spec": spec}


def _job_spec(config: Config, pod: Manifest, *, limit: int | None = None) -> Manifest:
    """An indexed Job of a pod for each node. limit: of failures; None: what max_failures means for all its pods."""
    n = config.launch.num_nodes
    if limit is None:
        limit = config.launch.kubernetes.max_failures * n  # when one is lost, all fail
    return {
        "completionMode": "Indexed",
        "completions": n,
        "parallelism": n,
        **_failures(config, limit),
        "template": _template(config, pod),
    }


def _prepare_spec(config: Config, cwd: str) -> Manifest:
    prepare = config.launch.prepare
    python = interpreter(config, "kubernetes")
    args = [python, "-m", "rwkv_cluster", "prepare", f"{CONFIG_FOLDER}/{launch_folder.CONFIG}"]
    resources = _resources(prepare.cpus, prepare.mem, {})
    pod = _pod(config, _container(config, args, resources) | {"workingDir": _pod_cwd(config, cwd)})
    return {"completions": 1, "parallelism": 1, **_failures(config, 0), "template": _template(config, pod)}


def _failures(config: Config, limit: int) -> Manifest:
    """Which failed pods are made again: without limit those that were taken away; none after a mistake."""
    if not config.launch.requeue:
        return {"backoffLimit": 0}
    container = {"containerName": MAIN[config.launch.kubernetes.kind]}
    ends = {**container, "operator": "In", "values": [*MISTAKES, PREEMPTED]}
    sent_away = {**container, "operator": "In", "values": [RESTART_CODE]}
    rules = [
        {"action": "FailJob", "onExitCodes": ends},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": sent_away},
    ]
    return {"backoffLimit": limit, "podFailurePolicy": {"rules": rules}}


def _template(config: Config, pod: Manifest) -> Manifest:
    return {"metadata": {"labels": {RUN_LABEL: object_name(config)}}, "spec": pod}


def _training_pod(config: Config, cwd: str, verb: str, node_variable: str) -> Manifest:
    launch = config.launch
    further = ("--restart-code", str(RESTART_CODE)) if launch.requeue else ()
    place = _pod_cwd(config, cwd)
    command = joined_torchrun(config, interpreter(config, "kubernetes"), place, node_variable, *further)
    args = [*command.argv, verb, f"{CONFIG_FOLDER}/{launch_folder.CONFIG}"]
    devices = dict(launch.kubernetes.resources)
    if launch.gpus_per_node:
        devices[launch.kubernetes.gpu_resource] = launch.gpus_per_node
    container = _container(config, args, _resources(launch.cpus_per_node, launch.mem, devices))
    container["env"] = [
        {"name": "RWKV_CLUSTER_LAUNCH", "value": _literal(pod_folder(config))},
        {"name": "RWKV_CLUSTER_NODES", "value": " ".join(node_names(config))},
        {"name": "RWKV_CLUSTER_MEET_S", "value": str(launch.kubernetes.start_s)},
        *container["env"],
    ]
    return _pod(config, container)


def pod_folder(config: Config) -> str:
    """Launch directory as the pods have it, the same for each start."""
    return str(WorkDir(config.work_dir).launches / object_name(config))


def _pod_cwd(config: Config, cwd: str) -> str:
    """The caller's directory where the pods have it."""
    return cwd if any(volume(text).holds(cwd) for text in config.launch.kubernetes.volumes) else "/"


def _container(config: Config, args: Sequence[str], resources: Manifest) -> Manifest:
    """The container of a pod. Its command stays the image's entry point, which passes signals on."""
    launch, kubernetes = config.launch, config.launch.kubernetes
    env: list[Manifest] = [{"name": name, "value": _literal(value)} for name, value in launch.env.items()]
    for name, reference in kubernetes.secrets.items():
        secret, key = reference.split("/")
        env.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    mounts = [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "shared-memory", "mountPath": SHARED_MEMORY},
    ]
    for each in map(volume, kubernetes.volumes):
        mount: Manifest = {"name": _volume_name(config, each.name), "mountPath": each.path}
        mounts.append(mount | {"readOnly": True} if each.read_only else mount)
    return {
        "name": MAIN[kubernetes.kind],
        "image": str(launch.container.image),
        "args": [_literal(argument) for argument in args],
        "env": env,
        "resources": resources,
        "volumeMounts": mounts,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _pod(config: Config, container: Manifest) -> Manifest:
    launch, kubernetes = config.launch, config.launch.kubernetes
    volumes: list[Manifest] = [
        {"name": "config", "configMap": {"name": object_name(config)}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": quantity(launch.container.shm_size)}},
    ]
    for claim in dict.fromkeys(volume(text).name for text in kubernetes.volumes):
        volumes.append({"name": _volume_name(config, claim), "persistentVolumeClaim": {"claimName": claim}})
    pod: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": launch.signal_s,
        "enableServiceLinks": False,  # variables for every service of the namespace, and some are torchrun's
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": volumes,
    }
    if kubernetes.run_as:
        user, group = map(int, kubernetes.run_as.split(":"))
        pod["securityContext"] = {"runAsUser": user, "runAsGroup": group, "fsGroup": group}
    if kubernetes.node_selector:
        pod["nodeSelector"] = dict(kubernetes.node_selector)
    if kubernetes.tolerations:
        pod["tolerations"] = [{"key": key, "operator": "Exists"} for key in kubernetes.tolerations]
    if kubernetes.priority_class:
        pod["priorityClassName"] = kubernetes.priority_class
    if kubernetes.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in kubernetes.pull_secrets]
    return pod


def _volume_name(config: Config, claim: str) -> str:
    """Name of a claim within the pod: short, and without dots."""
    claims = list(dict.fromkeys(volume(text).name for text in config.launch.kubernetes.volumes))
    return f"claim-{claims.index(claim)}"


def _resources(cpus: int | None, mem: str | None, devices: Mapping[str, int]) -> Manifest:
    requests: Manifest = {"cpu": str(cpus)} if cpus else {}
    limits: Manifest = {name: str(amount) for name, amount in devices.items()}
    if mem:
        requests["memory"] = limits["memory"] = quantity(mem, default="Mi")
    return {key: value for key, value in {"requests": requests, "limits": limits}.items() if value}


def quantity(text: str, default: str = "") -> str:
    """64G or 16g, for Slurm and docker powers of 1024, as Kubernetes writes it. default: the unit without a letter."""
    number, letter = re.fullmatch(r"(\d+)([kmgt]?)b?", text.lower()).groups()  # type: ignore[union-attr]
    return f"{number}{letter.upper()}i" if letter else f"{number}{default}"


def _literal(text: str) -> str:
    """`text` as it is: Kubernetes puts variables where arguments and values have $(NAME)."""
    return text.replace("$", "$$")


def _metadata(config: Config, name: str, *, with_queue: bool = False) -> Manifest:
    labels = {RUN_LABEL: name}
    if with_queue and config.launch.kubernetes.queue:
        labels["kueue.x-k8s.io/queue-name"] = config.launch.kubernetes.queue
    return {"name": name, "labels": labels, "annotations": {"rwkv-cluster/work-dir": config.work_dir}}


class Dumper(yaml.SafeDumper):
    """YAML in which nothing is abbreviated, and a text of several lines stands as it is."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write an object out each time."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


Dumper.add_representer(str, _text)
