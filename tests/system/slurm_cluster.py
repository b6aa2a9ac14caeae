"""A real Slurm for the tests, in a second: munge, slurmctld and one slurmd for each node, from Debian's packages.

All nodes are this one machine (`slurmd -N`), which needs no privilege but root: it also works in a plain container.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from system.processes import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CONF = """\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
MpiDefault=none
SelectType=select/cons_tres
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=20
KillWait=5
MinJobAge=600
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
AccountingStorageType=accounting_storage/none
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=4 ThreadsPerCore=1 RealMemory=16000 Gres=gpu:2 State=UNKNOWN\n"
)
PARTITIONS = """\
PartitionName=low Nodes=ALL Default=YES DefaultTime=10 DefMemPerNode=4000 PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL DefaultTime=10 DefMemPerNode=4000 PriorityTier=10 PreemptMode=OFF
"""


def reason_not_to() -> str | None:
    """Why this machine cannot have one; None when it can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"apt-get install slurm-wlm munge: {', '.join(missing)} missing" if missing else None


REASON = None if os.environ.get("CI") else reason_not_to()  # in CI nothing is left out
needs_slurm = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@dataclass(frozen=True)
class Cluster:
    """A running one. environment: what its commands need."""

    root: Path
    environment: dict[str, str]

    def run(self, *argv: str) -> str:
        """Output of a command of Slurm's."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def accepts(self, *argv: str) -> bool:
        """Whether a command of Slurm's succeeds now."""
        environment = {**os.environ, **self.environment}
        return subprocess.run(argv, env=environment, capture_output=True, timeout=60).returncode == 0

    def job(self, number: str) -> dict[str, str]:
        """Fields of a job, also for some minutes after its end."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)  # type: ignore[misc]

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def restarts(self, number: str) -> int:
        return int(self.job(number)["Restarts"])

    def wait_for_state(self, number: str, *states: str, timeout_s: float = 120.0) -> dict[str, str]:
        wait_until(lambda: self.state(number) in states, what=f"job {number} to be {states}", timeout_s=timeout_s)
        return self.job(number)


@contextmanager
def cluster(root: Path, nodes: int = 2) -> Iterator[Cluster]:
    """`nodes` idle nodes, all gone after the block. `root` holds keys, state and logs of the daemons."""
    ports = _free_ports(nodes + 1)
    host = socket.gethostname().partition(".")[0]
    names = [f"node{number}" for number in range(1, nodes + 1)]
    conf = CONF.format(root=root, host=host, port=ports[0])
    conf += "".join(NODE.format(name=n, host=host, port=p) for n, p in zip(names, ports[1:], strict=True))
    (root / "slurm.conf").write_text(conf + PARTITIONS)
    (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # only names paths; v2 and autodetection may die
    for number in range(2):
        (root / f"gpu{number}").symlink_to("/dev/null")  # a device file that is there
    (root / "gres.conf").write_text(f"Name=gpu File={root}/gpu[0-1]\n")
    made = Cluster(root, {"SLURM_CONF": str(root / "slurm.conf")})
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _begin_munge(root, daemons)
        _begin(["slurmctld", "-D", "-f", str(root / "slurm.conf")], made, daemons)
        for name in names:
            (root / f"spool.{name}").mkdir()
            _begin(["slurmd", "-D", "-f", str(root / "slurm.conf"), "-N", name], made, daemons)
        wait_until(lambda: _idle(made) == nodes, what=f"{nodes} idle nodes, see {root}", timeout_s=60)
        yield made
    finally:
        _end(made, daemons)


def _begin_munge(root: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    root.chmod(0o755)
    folder = root / "munge"
    folder.mkdir(mode=0o700)
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    options = [f"--key-file={folder}/key", f"--socket={root}/munge.sock", f"--pid-file={root}/munged.pid"]
    options += [f"--log-file={folder}/log", f"--seed-file={folder}/seed", "--foreground", "--force"]
    _begin(["munged", *options], Cluster(root, {}), daemons)
    wait_until((root / "munge.sock").exists, what="munged", timeout_s=30)


def _begin(argv: list[str], made: Cluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    with open(made.root / "daemons.log", "ab") as log:
        environment = {**os.environ, **made.environment}
        daemons.append(subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log))


def _idle(made: Cluster) -> int:
    with suppress(AssertionError, subprocess.TimeoutExpired):
        return int(made.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() or 0)
    return 0


def _end(made: Cluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    with suppress(AssertionError, subprocess.TimeoutExpired):
        numbers = made.run("squeue", "-h", "-o", "%A").split()
        if numbers:
            made.run("scancel", *numbers)
            deadline = time.monotonic() + 20
            while made.run("squeue", "-h").strip() and time.monotonic() < deadline:
                time.sleep(0.2)
    for daemon in reversed(daemons):
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports
