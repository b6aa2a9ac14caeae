"""The task that submitit runs on each node: the agent, while submitit owns the signal and queues the job again.

submitit itself would count every job that is shorter than ten minutes as timed out and give up after a few, and would
call a task whose ranks have saved and ended a success. Here no end counts as timed out, `requeued` in the launch
directory counts what `launch.max_requeues` limits, and a task returns only when training is complete.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from rwkv_cluster.errors import Preempted
from rwkv_cluster.launch.agent import ATTEMPT_VARIABLE, state_of
from rwkv_cluster.launch.launch_folder import CONFIG, REQUEUED
from rwkv_cluster.launch.outcome import Outcome, read_outcome
from rwkv_cluster.runtime.exit_report import LAUNCH_VARIABLE

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

POLL_S = 0.2
REPEAT_S = 1.0
SLURM_ENDS_US_S = 300.0
NEVER_MIN = 10**9  # a time limit so far away that submitit calls no end a timeout


class NodeTask:
    """One node's share of a job, for submitit. Pickled: two plain values, and nothing of the configuration.

    argv: starts the agent; the configuration's path is added where it runs.
    max_requeues: how often the job may be queued again; None: never.
    """

    def __init__(self, argv: Sequence[str], max_requeues: int | None) -> None:
        self.argv = tuple(argv)
        self.max_requeues = max_requeues
        self._agent: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Run the agent to its end. Exits with its code unless that is 0."""
        try:
            self._run()
        except subprocess.CalledProcessError as error:  # of submitit's `scontrol requeue`, in its signal handler
            if error.returncode >= 0:
                raise
            time.sleep(SLURM_ENDS_US_S)  # the job is queued again, which ends scontrol too, perhaps before it returns

    def _run(self) -> None:
        launch = os.environ[LAUNCH_VARIABLE]
        self._agent = subprocess.Popen([*self.argv, "train", f"{launch}/{CONFIG}"], preexec_fn=_keep_preemption_out)
        while not self._has_ended():
            time.sleep(POLL_S)
        code = self._agent.wait()
        outcome = _outcome()
        if code == Preempted.exit_code and _was_preempted(outcome) and outcome.stop_signal != "SIGTERM":
            time.sleep(SLURM_ENDS_US_S)  # returning would leave a result that says success
        if code:
            sys.exit(code if code > 0 else 128 - code)

    def checkpoint(self) -> DelayedSubmission | None:
        """submitit's call on the first task, in its signal handler: have all ranks save, and say what runs next.

        None where nothing does, because training is complete or has failed or the limit is reached.
        """
        while self._agent is not None and not self._has_ended():
            with suppress(ProcessLookupError):
                os.kill(self._agent.pid, signal.SIGUSR2)
            time.sleep(REPEAT_S)
        if self._agent is None or not _was_preempted(_outcome()) or self.max_requeues is None:
            return None
        launch, attempt = Path(os.environ[LAUNCH_VARIABLE]), os.environ[ATTEMPT_VARIABLE]
        with open(launch / REQUEUED, "a+") as handle:
            handle.seek(0)
            if len(set(handle.read().split()) - {attempt}) >= self.max_requeues:
                return None
            handle.write(f"{attempt}\n")
        return submission(self.argv, self.max_requeues)

    def _has_ended(self) -> bool:
        """Whether the process has ended; safe inside a signal handler, where Popen.poll's lock may be held."""
        assert self._agent is not None
        if self._agent.returncode is not None:
            return True
        return os.waitid(os.P_PID, self._agent.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def submission(argv: Sequence[str], max_requeues: int | None) -> DelayedSubmission:
    """The pickled call that submitit's process on each node loads and makes."""
    from submitit.core.utils import DelayedSubmission

    call = DelayedSubmission(NodeTask(argv, max_requeues))
    call.set_timeout(NEVER_MIN, 1)
    return call


def _outcome() -> Outcome | None:
    return read_outcome(state_of(os.environ))


def _was_preempted(outcome: Outcome | None) -> TypeGuard[Outcome]:
    return outcome is not None and outcome.how == "preempted"


def _keep_preemption_out() -> None:
    """Slurm's signal reaches every process: it must not end the agent before that listens."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
