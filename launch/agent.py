"""The one process on each node of a job: checks the node, starts the ranks, passes signals on, reports how it ended.

    python -m rwkv_cluster.launch.agent [OPTION...] -- COMMAND ARGUMENT...

COMMAND is torchrun, deepspeed or the trainer itself. Under Slurm the agents of a job meet through the launch directory:
the first one picks a free port there, so that no two jobs share one. Pods do the same, once they have agreed on a start
of the job (`meeting.py`). torchrun's own agent neither survives SIGUSR2 nor passes an exit code on, so this one keeps
the signal from it, repeats it to the ranks until they end, and reads how each rank said it ended. Runs inside the
container of the ranks; imports no torch.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rwkv_cluster.errors import EXIT_CODES, LaunchError, Preempted
from rwkv_cluster.launch.command import ALL_GPUS_VARIABLE, IN_LAUNCH_FOLDER
from rwkv_cluster.launch.launch_folder import BAD_NODE, RANK_ENVIRONMENT, STATE
from rwkv_cluster.launch.logs import Echo
from rwkv_cluster.launch.meeting import ATTEMPT_VARIABLE, NODE_VARIABLE, NODES_VARIABLE, join
from rwkv_cluster.launch.outcome import MISTAKES, Outcome, read_signal, write_signal
from rwkv_cluster.launch.preflight import BadNode, check_gpus, check_nodes
from rwkv_cluster.runtime.exit_report import LAUNCH_VARIABLE, STATE_VARIABLE, ExitReport, read_exit_report
from rwkv_cluster.runtime.rank_env import die_with_parent

PREEMPTED = Preempted.exit_code
POLL_S = 0.2
REPEAT_S = 1.0  # a signal reaches a rank that still imports torch, where nothing handles it yet
LEAVE_S = 30.0  # for a launcher to end once all its ranks have: torchrun waits for other nodes for minutes
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Node:
    """Place of this agent in the job.

    ranks: numbers of the ranks that run below it; without Slurm on several nodes only as many as these, for torchrun
    numbers the nodes when they meet.
    """

    host: str
    number: int
    names: tuple[str, ...]
    launch: Path
    state: Path
    ranks: tuple[int, ...]
    world_size: int
    per_rank: bool = False
    is_numbered: bool = True

    @property
    def is_first(self) -> bool:
        return self.ranks[0] == 0


@dataclass
class Ranks:
    """The running ranks of this node, and the first reason they were asked to stop."""

    process: subprocess.Popen[bytes]
    stop_signal: str | None = None
    table: list[str] = field(default_factory=list)  # what the launcher said of failed ranks

    def ask_to_stop(self, reason: str) -> None:
        self.stop_signal = self.stop_signal or reason

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to everything below the agent."""
        for pid in _descendants(os.getpid()):
            with suppress(OSError):
                os.kill(pid, number)


def this_node(environment: Mapping[str, str], ranks_per_node: int, per_rank: bool, n_nodes: int = 1) -> Node:
    """This node, as Slurm or its number says; otherwise the only one. Raises LaunchError without a launch directory."""
    launch = environment.get(LAUNCH_VARIABLE)
    if launch is None:
        raise LaunchError(
            f"{LAUNCH_VARIABLE} is not set: this is started by the script that rwkv-cluster launch writes"
        )
    host = environment.get("SLURMD_NODENAME", socket.gethostname())
    own = environment.get(NODE_VARIABLE, environment.get("SLURM_NODEID", "0"))
    number = int(own) if ATTEMPT_VARIABLE in environment else 0
    names = tuple(environment.get(NODES_VARIABLE, host).split())
    host = names[number] if NODE_VARIABLE in environment else host
    first = number * ranks_per_node
    ranks = (int(environment["SLURM_PROCID"]),) if per_rank else tuple(range(first, first + ranks_per_node))
    state = state_of({ATTEMPT_VARIABLE: f"{host}-{os.getpid()}", **environment})
    world_size = int(environment["SLURM_NTASKS"]) if per_rank else len(names) * ranks_per_node
    return Node(host, number, names, Path(launch), state, ranks, world_size, per_rank, is_numbered=n_nodes == 1)


def state_of(environment: Mapping[str, str]) -> Path:
    """Folder of what the nodes and ranks of one start of a job tell each other."""
    return Path(environment[LAUNCH_VARIABLE]) / STATE / environment[ATTEMPT_VARIABLE]


def run(
    node: Node,
    command: Sequence[str],
    cwd: str | None,
    on_start: Callable[[Ranks], None],
    *,
    gpus: int = 0,
    forward: str | None = None,
    echo: Callable[[], None] = lambda: None,
) -> int:
    """Check the node and its GPUs, run `command` as its ranks, and return the exit code that says how they ended.

    echo: called again and again while the ranks run, and once after.
    """
    try:
        node.state.mkdir(parents=True, exist_ok=True)
        check_gpus(gpus, node.host)
        port = check_nodes(node.state, node.number, node.names, first=node.is_first)
        if cwd is not None:
            os.chdir(cwd)
    except BadNode as error:
        if node.is_first or error.name == node.host:  # of others they know only that they waited
            with suppress(OSError):
                (node.state / BAD_NODE).write_text(f"{error.name}\n")
        raise
    except OSError as error:
        raise LaunchError(
            f"{node.host}: {error.strerror}: {error.filename}", remedy="Every node must see this directory"
        ) from None
    own = {STATE_VARIABLE: str(node.state), **_rendezvous(node, port), **gpus_of_job(os.environ)}
    environment = {**os.environ, **own}
    if forward is not None:
        environment["DS_ENV_FILE"] = str(_for_deepspeed(node, environment, forward))
    argv = [argument.replace(IN_LAUNCH_FOLDER, f"{node.launch}/", 1) for argument in command]
    ranks = Ranks(_start(argv, environment))
    on_start(ranks)
    reader = threading.Thread(target=_copy_errors, args=(ranks,), daemon=True)
    reader.start()
    wait_for_end(node, ranks, echo)
    reader.join(5)
    echo()
    code = classify_exit(node, ranks)
    if code == PREEMPTED and node.is_numbered:
        wait_for_other_nodes(node)
    return code


def gpus_of_job(environment: Mapping[str, str]) -> dict[str, str]:
    """CUDA's variables for the ranks in a docker container of a Slurm job, which has all GPUs of its node.

    Slurm numbers a job's GPUs in CUDA_VISIBLE_DEVICES from 0 where cgroups hide the others. In a container of docker's
    daemon they do not, and two jobs on a node would take the same. SLURM_STEP_GPUS has the node's numbers.
    """
    numbers = environment.get("SLURM_STEP_GPUS") or environment.get("SLURM_JOB_GPUS")
    if ALL_GPUS_VARIABLE not in environment or not numbers:
        return {}
    return {"CUDA_VISIBLE_DEVICES": numbers, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def wait_for_end(node: Node, ranks: Ranks, echo: Callable[[], None]) -> None:
    """Wait until the ranks have ended, and meanwhile repeat a request to stop to them."""
    next_signal, all_told = 0.0, None
    while ranks.process.poll() is None:
        echo()
        now = time.monotonic()
        if ranks.stop_signal and now >= next_signal:
            write_signal(node.state, ranks.stop_signal)  # nodes that were sent none end with this one
            ranks.tell(signal.SIGUSR1)
            next_signal = now + REPEAT_S
        if all_told is None and None not in exit_reports(node).values():
            all_told = now
        if all_told is not None and now > all_told + LEAVE_S:
            ranks.process.kill()
        time.sleep(POLL_S)


def wait_for_other_nodes(node: Node) -> None:
    """Wait for the reports of all ranks: the first node to end makes srun kill the others, which may still save."""
    deadline = time.monotonic() + LEAVE_S
    while time.monotonic() < deadline and not all(
        read_exit_report(node.state, rank) for rank in range(node.world_size)
    ):
        time.sleep(POLL_S)


def exit_reports(node: Node) -> dict[int, ExitReport | None]:
    """Exit report of each rank of this node; None where there is none yet."""
    if node.is_numbered:
        return {rank: read_exit_report(node.state, rank) for rank in node.ranks}
    numbers = [int(path.name.removeprefix("rank-")) for path in node.state.glob("rank-*") if path.suffix != ".tmp"]
    silent = [rank for rank in node.ranks if rank not in numbers][: len(node.ranks) - len(numbers)]
    return {rank: read_exit_report(node.state, rank) for rank in (*numbers, *silent)}


def classify_exit(node: Node, ranks: Ranks) -> int:
    """Exit code of this node, from how its ranks ended. The first node to fail or be stopped writes the outcome."""
    reports = exit_reports(node)
    codes = {report.code for report in reports.values() if report is not None}
    if codes == {0} and None not in reports.values():
        return 0
    if codes <= {0, PREEMPTED} and PREEMPTED in codes and None not in reports.values():
        stop_signal = ranks.stop_signal or read_signal(node.state)
        if stop_signal:
            outcome = Outcome("preempted", PREEMPTED, f"stopped after {stop_signal}", stop_signal)
        else:
            outcome = Outcome("stopped", PREEMPTED, "stopped by a STOP file")
        outcome.write(node.state)
        return PREEMPTED
    code, message = _first_failure(node, ranks, reports)
    sys.stderr.write(f"rwkv-cluster: {message}\n")
    Outcome("failed", code, message).write(node.state)
    return code


def _first_failure(node: Node, ranks: Ranks, reports: Mapping[int, ExitReport | None]) -> tuple[int, str]:
    """Exit code and sentence of the rank that failed first, as far as this node can tell."""
    failed = [report for report in reports.values() if report is not None and report.code not in (0, PREEMPTED)]
    own = [report for report in failed if report.about is None]
    # A rank that quotes another may be the first to end, and its launcher then ends the other before that can report.
    quoted = [report for report in failed if report.is_quoted]
    silent = [rank for rank, report in reports.items() if report is None]
    if own or quoted or (failed and not silent):
        report = (own or quoted or failed)[0]
        meaning = EXIT_CODES.get(report.code, f"exit code {report.code}")
        rank = f"rank {report.origin} on {_host_of(node, report.origin)}"
        return report.code, f"{rank} failed ({meaning}): {report.message}".strip(": ")
    how = "; ".join(ranks.table) or f"its launcher ended with code {ranks.process.returncode}"
    which = f"rank {', '.join(map(str, silent))}" if node.is_numbered else f"{len(silent)} of its ranks"
    log = f"rank-{silent[0]}.log" if node.is_numbered else "rank-*.log"
    return 1, f"{which} on {node.host} exited without reporting an error ({how}). See {node.launch}/{log}"


def _host_of(node: Node, rank: int) -> str:
    """Name of the node that rank is on; ranks are numbered node by node."""
    if not node.is_numbered:
        report = read_exit_report(node.state, rank)
        return report.host if report else "another node"
    if rank in node.ranks:
        return node.host
    per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE", "1")) if node.per_rank else len(node.ranks)
    return node.names[rank // per_node]


def _for_deepspeed(node: Node, environment: Mapping[str, str], names: str) -> Path:
    """The file from which deepspeed's launcher takes the environment of the ranks on other nodes."""
    variables = [LAUNCH_VARIABLE, STATE_VARIABLE, *filter(None, names.split(","))]
    path = node.state / RANK_ENVIRONMENT
    path.write_text("".join(f"{name}={environment[name]}\n" for name in variables))
    return path


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    def prepare() -> None:
        die_with_parent()
        for number in (signal.SIGUSR1, signal.SIGUSR2):  # inherited until a rank listens itself; torchrun would die
            signal.signal(number, signal.SIG_IGN)

    try:
        return subprocess.Popen(list(command), env=dict(environment), stderr=subprocess.PIPE, preexec_fn=prepare)
    except OSError as error:
        raise LaunchError(f"{command[0]} cannot be started: {error.strerror}", remedy="Look at launch.python") from None


def _copy_errors(ranks: Ranks) -> None:
    """Copy the launcher's stderr to this process's, and keep its table of failed ranks."""
    assert ranks.process.stderr is not None
    rank = "?"
    for line in iter(ranks.process.stderr.readline, b""):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
        text = line.decode(errors="replace")
        if rank_row := re.search(r"^\s*rank\s+: (\d+) ", text):
            rank = rank_row[1]
        elif (code_row := re.search(r"^\s*exitcode\s+: (-?\d+) ", text)) and int(code_row[1]) < 0:
            number = -int(code_row[1])
            ranks.table.append(f"rank {rank} was killed by signal {number}, {signal.Signals(number).name}")


def _rendezvous(node: Node, port: int | None) -> dict[str, str]:
    """Variables that say where the ranks meet: torchrun's own for its options, or those of a rank."""
    if port is None:
        return {}
    first = node.names[0] if NODE_VARIABLE in os.environ else _address(node.names[0])
    if not node.per_rank:
        return {"PET_NODE_RANK": str(node.number), "PET_MASTER_ADDR": first, "PET_MASTER_PORT": str(port)}
    local = {"LOCAL_RANK": os.environ["SLURM_LOCALID"], "LOCAL_WORLD_SIZE": os.environ["SLURM_NTASKS_PER_NODE"]}
    own = {"RANK": str(node.ranks[0]), "WORLD_SIZE": os.environ["SLURM_NTASKS"]}
    return {**local, **own, "MASTER_ADDR": first, "MASTER_PORT": str(port)}


def _address(name: str) -> str:
    """A Slurm node's name where it resolves; this machine's, where several of its nodes are one machine."""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return socket.gethostname()
    return name


def _descendants(pid: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    descendants, generation = [], [pid]
    while generation := [child for child, parent in parents.items() if parent in generation]:
        descendants += generation
    return descendants


def main(argv: Sequence[str] | None = None) -> int:
    """The command of this module; returns an exit code of errors.py."""
    parser = argparse.ArgumentParser(prog="rwkv_cluster.launch.agent", allow_abbrev=False)
    parser.add_argument("--cwd")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=1, help="that torchrun numbers")
    parser.add_argument("--forward", help="names of variables, for deepspeed to set on other nodes")
    parser.add_argument("--per-rank", action="store_true")
    parser.add_argument("--node-variable", help="has this node's number, where nodes are started one by one")
    parser.add_argument("--restart-code", type=int, help="exit code by which such a node is started again")
    parser.add_argument("--echo", action="store_true", help="copy the ranks' logs to stdout")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(argv)

    def listen(ranks: Ranks) -> None:
        def on_signal(number: int, frame: FrameType | None) -> None:
            ranks.ask_to_stop(signal.Signals(number).name)

        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
                signal.signal(number, on_signal)

    node = None
    try:
        if options.node_variable:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(options.restart_code or 128 + number))
            try:
                join(os.environ, options.node_variable)
            except BadNode as error:  # which may only wait for a place
                if options.restart_code is None:
                    raise
                sys.stderr.write(f"rwkv-cluster: {error}\n")
                return options.restart_code
        node = this_node(os.environ, options.ranks, options.per_rank, options.nodes)
        echo = Echo(node.launch, node.ranks).copy if options.echo else lambda: None
        code = run(node, options.command, options.cwd, listen, gpus=options.gpus, forward=options.forward, echo=echo)
        was_sent_away = code not in (0, *MISTAKES) and read_signal(node.state) is not None
        return options.restart_code if options.restart_code and was_sent_away else code
    except LaunchError as error:
        sys.stderr.write(f"rwkv-cluster: error: {error}\n")
        if node is not None:
            Outcome("failed", error.exit_code, str(error)).write(node.state)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
