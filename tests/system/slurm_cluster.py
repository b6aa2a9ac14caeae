"""A real Slurm for the tests, in a second: munge, slurmctld and one slurmd for each node, from Debian's packages.

Each node is a host of its own (see `hosts`). Where that is not allowed, all are this one machine (`slurmd -N`), which
needs no privilege but root and also works in a plain container.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from system import hosts
from system.hosts import Host
from system.processes import wait_until

PORT = 6818  # Slurm's own for a node
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CONF = """\
ClusterName=ci
SlurmctldHost={controller}
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/store.%n
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
SlurmdTimeout=10
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
    "NodeName={name} {place} Port={port} CPUs=4 Boards=1 SocketsPerBoard=1 "
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
    """A running one.

    environment, prefix: what its commands need. hosts: by node name; empty where all nodes are this machine.
    """

    root: Path
    environment: dict[str, str]
    prefix: tuple[str, ...] = ()
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def interface(self) -> str:
        """Where the ranks find each other."""
        return hosts.INTERFACE if self.hosts else "lo"

    def run(self, *argv: str) -> str:
        """Output of a command of Slurm's."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run((*self.prefix, *argv), env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def accepts(self, *argv: str) -> bool:
        """Whether a command of Slurm's succeeds now."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run((*self.prefix, *argv), env=environment, capture_output=True, timeout=60)
        return done.returncode == 0

    def begin(self, *argv: str, prefix: tuple[str, ...] | None = None) -> subprocess.Popen[bytes]:
        """A daemon, on the controller's host or after `prefix`."""
        environment = {**os.environ, **self.environment}
        with open(self.root / "daemons.log", "ab") as log:
            on = self.prefix if prefix is None else prefix
            return subprocess.Popen((*on, *argv), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def begin_node(self, name: str) -> subprocess.Popen[bytes]:
        """The daemon of a node."""
        prefix = self.hosts[name].prefix if self.hosts else ()
        return self.begin("slurmd", "-D", "-f", f"{self.root}/slurm.conf", "-N", name, prefix=prefix)

    def idle(self) -> int:
        """Number of nodes that wait for jobs."""
        with suppress(AssertionError, subprocess.TimeoutExpired):
            return int(self.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() or 0)
        return 0

    def cancel_all(self) -> None:
        """End every job, and wait until it has ended."""
        while numbers := self.run("squeue", "-h", "-o", "%A").split():
            self.accepts("scancel", *numbers)
            wait_until(lambda: not self.run("squeue", "-h").strip(), what="the end of all jobs", timeout_s=60)

    def job(self, number: str) -> dict[str, str]:
        """Fields of a job, also for some minutes after its end."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)  # type: ignore[misc]

    def state(self, number: str) -> str:
        return self.run("squeue", "-h", "-t", "all", "-j", number, "-o", "%T").strip()

    def restarts(self, number: str) -> int:
        return int(self.job(number)["Restarts"])

    def wait_for_state(self, number: str, *states: str, timeout_s: float = 120.0) -> dict[str, str]:
        wait_until(lambda: self.state(number) in states, what=f"job {number} to be {states}", timeout_s=timeout_s)
        return self.job(number)


@contextmanager
def cluster(root: Path, nodes: int = 3) -> Iterator[Cluster]:
    """`nodes` idle nodes, all gone after the block. `root` holds keys, state and logs of the daemons."""
    names = [f"node{number}" for number in range(1, nodes + 1)]
    with ExitStack() as stack:
        if hosts.reason_not_to() is None:
            controller, *machines = stack.enter_context(hosts.hosts(["ctl", *names]))
            by_name = dict(zip(names, machines, strict=True))
            places = [(f"NodeAddr={by_name[name].address}", PORT) for name in names]
            host, port = f"ctl({controller.address})", PORT - 1
            made = Cluster(root, {"SLURM_CONF": str(root / "slurm.conf")}, controller.prefix, by_name)
        else:
            own = socket.gethostname().partition(".")[0]
            port, *ports = _free_ports(nodes + 1)
            places = [(f"NodeHostname={own} NodeAddr=127.0.0.1", number) for number in ports]
            host = f"{own}(127.0.0.1)"
            made = Cluster(root, {"SLURM_CONF": str(root / "slurm.conf")})
        lines = [NODE.format(name=name, place=at, port=on) for name, (at, on) in zip(names, places, strict=True)]
        (root / "slurm.conf").write_text(
            CONF.format(root=root, controller=host, port=port) + "".join(lines) + PARTITIONS
        )
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # only names paths; v2 and autodetection may die
        for number in range(2):
            (root / f"gpu{number}").symlink_to("/dev/null")  # a device file that is there
        (root / "gres.conf").write_text(f"Name=gpu File={root}/gpu[0-1]\n")
        daemons: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, made, daemons)
        _begin_munge(root, daemons)
        daemons.append(made.begin("slurmctld", "-D", "-f", f"{root}/slurm.conf"))
        for name in names:
            (root / f"store.{name}").mkdir()
            daemons.append(made.begin_node(name))
        wait_until(lambda: made.idle() == nodes, what=f"{nodes} idle nodes, see {root}", timeout_s=60)
        yield made


def _begin_munge(root: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    root.chmod(0o755)
    folder = root / "munge"
    folder.mkdir(mode=0o700)
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    options = [f"--key-file={folder}/key", f"--socket={root}/munge.sock", f"--pid-file={root}/munged.pid"]
    options += [f"--log-file={folder}/log", f"--seed-file={folder}/seed", "--foreground", "--force"]
    daemons.append(Cluster(root, {}).begin("munged", *options))
    wait_until((root / "munge.sock").exists, what="munged", timeout_s=30)


def _end(made: Cluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    with suppress(AssertionError, subprocess.TimeoutExpired):
        made.cancel_all()
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
