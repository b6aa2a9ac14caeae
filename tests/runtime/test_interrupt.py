"""A signal is heard at any moment, answered at once, obeyed by the main thread or in its place; a second insists."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_run import tiny_run_config, write_config

from rwkv_cluster.cli import main
from rwkv_cluster.errors import Interrupted
from rwkv_cluster.runtime import interrupt
from rwkv_cluster.runtime.interrupt import PRESSES, STOP_SIGNALS, Listener, listening


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def wait_for_signal() -> None:
    """For the main thread's turn."""
    signal.sigtimedwait((), 10)


@pytest.fixture(autouse=True)
def _two_signals_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "SAME_S", 0.0)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_what_is_going_on(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in STOP_SIGNALS]
    with pytest.raises(Interrupted, match=f"^interrupted by {number.name}$") as caught, listening():
        send(number)
    assert caught.value.exit_code == 128 + number
    assert [signal.getsignal(one) for one in STOP_SIGNALS] == before


def test_what_is_cleaned_up_on_the_way_out_is_left_in_peace() -> None:
    cleaned = []

    def work() -> None:
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGUSR1)
            cleaned.append("all")

    with pytest.raises(Interrupted), listening():
        work()
    assert cleaned == ["all"]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_command_that_ends_by_itself_is_told_and_says_so(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "rwkv_cluster"), listening() as listener:
        listener.defer("stopping soon")
        send(number)
    assert listener.reason == number.name
    (message,) = caplog.messages
    assert message.startswith(f"{number.name} received: stopping soon")
    assert ("Press again" in message) == (number == signal.SIGINT)


@pytest.mark.parametrize("number", PRESSES)
def test_a_second_press_insists(number: signal.Signals) -> None:
    def press_twice(listener: Listener) -> None:
        listener.defer("stopping soon")
        send(number)
        until(lambda: listener.count == 1)
        send(number)
        wait_for_signal()

    with pytest.raises(Interrupted) as caught, listening() as listener:
        press_twice(listener)
    assert caught.value.insisted


@pytest.mark.parametrize("number", sorted(set(STOP_SIGNALS) - set(PRESSES)))
def test_what_slurm_and_agents_repeat_is_no_second_press(number: signal.Signals) -> None:
    with listening() as listener:
        listener.defer("stopping soon")
        for count in (1, 2, 3):
            send(number)
            until(lambda count=count: listener.count == count)  # type: ignore[misc]


def test_one_press_that_comes_by_two_ways_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with listening() as listener:
        listener.defer("stopping soon")
        for count in (1, 2):
            send(signal.SIGINT)
            until(lambda count=count: listener.count == count)  # type: ignore[misc]


def test_under_nohup_a_closed_terminal_is_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening():
            send(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def until(condition: Callable[[], bool]) -> None:
    """Let the listening thread come to its turn."""
    for _ in range(10_000):
        if condition():
            return
        signal.sigtimedwait((), 0.001)
    raise AssertionError("nothing was heard")


def test_train_that_has_not_begun_is_preempted_and_other_verbs_are_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rwkv_cluster.config.recipes.find_config", lambda *_: send(signal.SIGTERM))
    run_yaml = str(write_config(tmp_path / "run.yaml", tiny_run_config(tmp_path)))
    assert main(["train", run_yaml]) == 75
    assert re.fullmatch("rwkv-cluster: interrupted by SIGTERM.* again continues\n", capsys.readouterr().err)
    assert main(["plan", run_yaml]) == 143
    assert capsys.readouterr().err == "rwkv-cluster: interrupted by SIGTERM\n"


def test_a_main_thread_that_hears_nothing_is_ended_in_its_place() -> None:
    """It waits in C for a lock that nobody opens, as in torch for ranks that do not come."""
    code = (
        "import ctypes, os, signal, threading\n"
        "from rwkv_cluster.runtime import interrupt\n"
        "interrupt.GRACE_S = 0.1\n"
        "lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)\n"
        "lock(mutex)\n"
        "with interrupt.listening(lambda error: error.exit_code):\n"
        "    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    lock(mutex)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 143, done.stderr


@pytest.fixture
def first_moment() -> Iterator[subprocess.Popen[bytes]]:
    """A command that is held up while it imports its first module."""
    code = (
        "import sys, time\n"
        "class Held:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'rwkv_cluster.cli':\n"
        "            print('there', flush=True)\n"
        "            while True:\n"
        "                time.sleep(0.01)  # a signal just before signal.pause() would leave it waiting\n"
        "sys.meta_path.insert(0, Held())\n"
        "from rwkv_cluster.__main__ import main\n"
        "main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_moment_has_no_traceback(number: signal.Signals, first_moment: subprocess.Popen[bytes]) -> None:
    assert first_moment.stdout is not None
    assert first_moment.stdout.readline() == b"there\n"
    first_moment.send_signal(number)
    _, said = first_moment.communicate(timeout=30)
    assert said.decode() == f"rwkv-cluster: interrupted by {number.name}\n"
    assert first_moment.returncode == 128 + number


def test_a_signal_while_the_process_forks_is_not_lost() -> None:
    """What a handler raises in a hook of fork is ignored, and a hook of logging would keep its lock for ever."""
    script = """if 1:
    import os, signal, time
    from rwkv_cluster.errors import Interrupted
    from rwkv_cluster.runtime.interrupt import listening
    os.register_at_fork(before=lambda: signal.raise_signal(signal.SIGUSR1))
    try:
        with listening():
            if os.fork() == 0:
                os._exit(0)
            os.wait()
            time.sleep(60)
    except Interrupted as error:
        print(error)
    """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert run.stdout == "interrupted by SIGUSR1\n", run.stderr
    assert "ignored" not in run.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_command_that_ignores_signals_survives_them_to_its_very_end(number: signal.Signals) -> None:
    """Agents and launchers repeat theirs; what runs when the interpreter ends may take seconds."""
    script = f"""if 1:
    import os, signal
    from rwkv_cluster.runtime.interrupt import listening
    class Slow:
        def __del__(self, kill=os.kill, own=os.getpid()):
            kill(own, {int(number)})
    with listening() as listener:
        listener.ignore()
    listener.slow = Slow()
    """
    assert subprocess.run([sys.executable, "-c", script], timeout=50).returncode == 0


def test_a_conversation_answers_ctrl_c_itself() -> None:
    pressed: list[bool] = []
    with listening() as listener:
        listener.answer_interrupts(lambda: pressed.append(True))
        for count in (1, 2, 3):
            send(signal.SIGINT)
            until(lambda count=count: len(pressed) == count)  # type: ignore[misc]
        assert (listener.count, listener.reason) == (0, None)
        with pytest.raises(Interrupted, match="SIGTERM"):
            send(signal.SIGTERM)
