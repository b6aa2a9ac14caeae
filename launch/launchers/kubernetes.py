"""Launching on Kubernetes: what kubernetes_manifests.py writes, by kubectl."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_cluster.config import Config
from rwkv_cluster.errors import Interrupted, LaunchError
from rwkv_cluster.launch.command import Command
from rwkv_cluster.launch.launchers.kubectl import PodLogs, Workload
from rwkv_cluster.launch.launchers.kubernetes_manifests import manifests
from rwkv_cluster.launch.launchers.launcher import Launched, Plan, Tool, with_record

MANIFESTS = "job.yaml"
MAX_REMARKS = 5
END_CONDITIONS = ("Complete", "Completed", "Succeeded", "Failed")  # of Job, JobSet and PyTorchJob


@dataclass(frozen=True)
class Kubernetes:
    """Launcher of the target kubernetes. States are Kubernetes' words for conditions of the object and of pods."""

    runs_here: bool = False
    end_states: Collection[str] = ("ended", *END_CONDITIONS)
    end_s: float = 60.0
    poll_s: float = 2.0

    def tools(self, config: Config) -> tuple[Tool, ...]:
        """kubectl, a cluster that answers it, and leave to make the object."""
        workload = Workload.of(config)
        fault = (
            f"launch.target is kubernetes, but `kubectl auth can-i create {workload.resource}` does not say yes here",
            "Install kubectl, or look at launch.kubernetes.context and namespace",
        )
        argv = workload.argv("auth", "can-i", "create", workload.resource, "--request-timeout=10s")
        return (Tool(argv, "yes", fault),)

    def require(self) -> None:
        """Accept every Python."""

    def script(self, config: Config, cwd: Path, verb: str) -> Plan:
        """The manifests, and the command that makes what they describe. Raises ConfigError."""
        files = {MANIFESTS: manifests(config, str(cwd), verb)}
        return with_record(config, cwd, files, [Command(Workload.of(config).argv("create", f"--filename={MANIFESTS}"))])

    def submit(self, plan: Plan, folder: Path, members: Sequence[Path]) -> Launched:
        """Make the objects, in place of those of an earlier launch that has ended, and return at once.

        Raises LaunchError, also where the earlier one goes on.
        """
        workload = Workload.of(plan.config)
        found = workload.get()
        if found is not None and _end_condition(found) is None:
            raise LaunchError(
                f"{workload.kind} {workload.name}, which has this work_dir, has not ended",
                remedy=f"Wait for it, or end it: `{Command(('rwkv-cluster', 'cancel', plan.config.work_dir)).shell()}`",
            )
        workload.write(folder)
        _delete(workload, "--wait=true")
        try:
            workload.kubectl("create", f"--filename={MANIFESTS}", folder=folder)
        except (LaunchError, Interrupted):
            _delete(workload, "--wait=false")
            raise
        return Launched(folder, (workload.name,), has_logs=False)

    def state(self, folder: Path) -> tuple[str, str]:
        """State of the object, and what its pods do. Raises LaunchError."""
        workload = Workload.read(folder)
        found = workload.get()
        if found is None:
            return "ended", f"{workload.kind} {workload.name}, which the cluster no longer has"
        phases, remarks = workload.phases()
        words = [f"{workload.kind} {workload.name}", *(f"{n} {phase}" for phase, n in sorted(phases.items()))]
        detail = ", ".join([*words, *remarks[:MAX_REMARKS]])
        end = _end_condition(found)
        if end is not None:
            why = " ".join(str(end[key]) for key in ("reason", "message") if end.get(key))
            return str(end["type"]), f"{detail}, {why}" if why else detail
        if "deletionTimestamp" in found["metadata"]:
            return "Terminating", detail
        if _condition(found, "Suspended"):
            return "Suspended", detail
        return ("Running" if phases["Running"] else "Pending"), detail

    def logs(self, folders: Sequence[Path], rank: int | None) -> PodLogs:
        """What the pods say."""
        return PodLogs(Workload.read(folders[0]), rank)

    def cancel(self, folder: Path, *, now: bool) -> None:
        """Delete the object, whose pods get SIGTERM and save, or kill them too. Raises LaunchError."""
        workload = Workload.read(folder)
        _delete(workload, "--cascade=foreground", "--wait=false")
        if now:
            workload.kubectl("delete", "pods", workload.pods, "--grace-period=0", "--force", "--wait=false")


def _delete(workload: Workload, *options: str) -> None:
    """Delete what a launch has made. Raises LaunchError."""
    types = f"{workload.resource},services,configmaps"
    workload.kubectl("delete", types, workload.pods, "--ignore-not-found", *options)


def _condition(found: dict[str, Any], condition: str) -> dict[str, Any] | None:
    """The condition of this type, where it holds."""
    conditions = found.get("status", {}).get("conditions") or []
    return next((each for each in conditions if each["type"] == condition and each["status"] == "True"), None)


def _end_condition(found: dict[str, Any]) -> dict[str, Any] | None:
    """The condition by which an object is over; None while it is not."""
    return next((end for type in END_CONDITIONS if (end := _condition(found, type))), None)
