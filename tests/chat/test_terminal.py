"""The conversation as people and programs have it: lines in, answers out, commands, and Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from rwkv_cluster.cli import main
from rwkv_cluster.interchange.state_file import load_state
from rwkv_cluster.model.own_state import own_state
from rwkv_cluster.model.weights_file import load_pth, save_pth

DRAWN = ("--temperature", "1")
Chat = Callable[..., tuple[int, str, str]]
OPTIONS = ("--tokenizer", "byte", "--tokens", "12", "--temperature", "0")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.pth"
    save_pth(path, tiny_model("x070", vocab_size=257, noise=0.1).state_dict())
    return path


@pytest.fixture
def chat(weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Exit code, stdout and stderr of a conversation with these lines, or bytes, on stdin."""

    def run(*lines: str | bytes, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        said = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said), encoding="utf-8"))
        code = main(["chat", str(weights), *OPTIONS, *options])
        return code, *capsys.readouterr()

    return run


def test_each_line_has_its_answer(chat: Chat) -> None:
    code, out, err = chat("hello", "", "and you?")
    assert (code, out.count("\n")) == (0, 2)
    assert err.count("as many tokens as --tokens allows") == 2
    assert chat("hello", "/exit", "and you?")[1] == out.splitlines(keepends=True)[0]


def test_history_counts_until_it_is_forgotten(chat: Chat) -> None:
    chat("/save before.pth", "hello", "/save after.pth", "/reset", "/save anew.pth")
    before, after, anew = (load_pth(Path(f"{name}.pth")) for name in ("before", "after", "anew"))
    assert all(torch.equal(anew[name], tensor) for name, tensor in before.items())
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_saved_conversation_goes_on(chat: Chat) -> None:
    _, whole, _ = chat("hello", "and you?", "/save whole.pth")
    _, first, err = chat("hello", "/save kept.pth")
    assert "--state kept.pth goes on" in err
    _, second, _ = chat("and you?", "/save both.pth", options=("--state", "kept.pth"))
    assert first + second == whole
    kept, both, wanted = (load_pth(Path(f"{name}.pth")) for name in ("kept", "both", "whole"))
    assert all(torch.equal(both[name], tensor) for name, tensor in wanted.items())
    assert any(not torch.equal(kept[name], tensor) for name, tensor in wanted.items())
    model = tiny_model("x070", vocab_size=257)
    load_state(model, Path("kept.pth"))
    assert {tensor.dtype for tensor in own_state(model).values()} == {torch.float32}


def test_a_line_that_ends_with_a_backslash_goes_on(chat: Chat) -> None:
    _, one, _ = chat("a\\", "b", options=DRAWN)
    _, other, _ = chat("ab", options=DRAWN)
    assert one.count("\n") == 1
    assert one != other


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/rest", "/rest is no command. There are /reset, /save, /think, /help, /exit"),
        ("/save", "/save needs the name of a file"),
        ("/save no/such/folder/x.pth", "no/such/folder/x.pth cannot be written: No such file or directory"),
        ("/think hard", "/think is 'hard', expected one of: on, off, auto"),
        (b"\xff\n", "the question is no UTF-8 text. Check the terminal's encoding"),
    ],
)
def test_a_mistake_ends_nothing(line: str | bytes, sentence: str, chat: Chat) -> None:
    code, out, err = chat(line, "hello")
    assert code == 0
    assert sentence in err
    assert (0, out) == chat("hello")[:2]


def test_thinking_is_begun_or_not(chat: Chat) -> None:
    _, on, _ = chat("/think on", "q")
    _, off, _ = chat("q", options=("--think", "off"))
    assert on.startswith("<think")
    assert off.startswith("<think></think")
    assert "/think" in chat("/help")[2]


def test_what_the_model_says_does_not_command_the_terminal(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_cluster.chat.session.draw", lambda *_, **__: iter([*(c + 1 for c in b"\x1b[2Jab"), 0]))
    assert chat("q")[1] == "\\x1b[2Jab\n"


def test_json_is_refused(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(weights), "--json"]) == 2
    assert "generate --template g1 --json answers one question" in capsys.readouterr().err


@pytest.mark.system
def test_ctrl_c_stops_the_answer_and_not_the_program(weights: Path) -> None:
    """Typed on a terminal of the program's own: twice during answers, once at the prompt, then Ctrl-D."""
    endless = tiny_model("x070", vocab_size=257, noise=0.1)
    with torch.no_grad():  # no document ends
        endless.ln_out.bias[0] = 100
        endless.head.weight[:, 0] = 0
        endless.head.weight[0, 0] = -1
    save_pth(weights, endless.state_dict())
    master, slave = pty.openpty()
    arguments = ["chat", str(weights), "--tokenizer", "byte", "--tokens", "10000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rwkv_cluster", *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
    )
    os.close(slave)
    shown = bytearray()

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, bytes(shown)
            if select.select([master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the program has ended
                    shown.extend(os.read(master, 4096))

    def is_told_how_to_end() -> bool:
        """Typed again as long as nothing comes: readline does not hear what comes just before it waits."""
        os.write(master, b"\x03")
        return b"/exit or Ctrl-D ends" in shown

    def has_ended() -> bool:
        if process.poll() is None:
            os.write(master, b"\x04")
        return process.returncode is not None

    try:
        wait_for(lambda: shown.endswith(b"> "))
        for _ in range(2):
            os.write(master, b"hello\n")
            length = len(shown)
            wait_for(lambda length=length: len(shown) > length + 40)  # type: ignore[misc]
            os.write(master, b"\x03")
            wait_for(lambda: shown.endswith(b"\n> "))
        wait_for(is_told_how_to_end)
        wait_for(has_ended)
        assert process.returncode == 0, bytes(shown)
    finally:
        process.kill()
        process.wait()
        os.close(master)
