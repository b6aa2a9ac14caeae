"""A session reads what training on the whole conversation reads, in constant memory, whatever ends an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import relative_error, tiny_model

from rwkv_cluster.chat import session as session_module
from rwkv_cluster.chat.session import ChatOptions, ChatSession
from rwkv_cluster.data.conversations.template import Template, load_template
from rwkv_cluster.data.conversations.turns import Conversation, Turn
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
PLAIN = """{% for m in messages %}{% if m.role == 'assistant' %}<a>{{ m.content }}</a>
{% else %}<{{ m.role }}>{{ m.content }}</>
{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"""
BLOCKS = PLAIN.replace("{{ m.content }}</a>", "{% generation %}{{ m.content }};{% endgeneration %}</a>")


@pytest.fixture
def speak(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`speak(*answers)`: what the model says after each question; \\0 stands for the end of a document."""

    def script(*answers: str) -> None:
        remaining = iter(answers)

        def draw(*_: Any, **__: Any) -> Iterator[int]:
            yield from (0 if c == 0 else c + 1 for c in next(remaining).encode())
            pytest.fail("went on after the answer's end")

        monkeypatch.setattr(session_module, "draw", draw)

    return script


def session_of(model: RWKV, template: Template, **changes: Any) -> ChatSession:
    options = {"n_tokens": 60, "temperature": 1.0, "top_p": 1.0, "seed": 0, **changes}
    return ChatSession(model, BYTES, template, ChatOptions(**options))


def template_of(name: str, folder: Path) -> Template:
    if name == "g1":
        return load_template("g1")
    (folder / "t.jinja").write_text({"plain": PLAIN, "blocks": BLOCKS}[name])
    return load_template(str(folder / "t.jinja"))


@pytest.mark.parametrize("name", ["g1", "plain", "blocks"])
def test_the_state_is_that_of_the_conversation_as_it_is_trained_on(
    name: str, tmp_path: Path, speak: Callable[..., None]
) -> None:
    model, template = tiny_model("x070", vocab_size=257), template_of(name, tmp_path)
    ends = {"g1": "\n\nUser: more", "plain": "</a>\n", "blocks": ";</a>"}
    speak(f" Hello. {ends[name]}", " two\n\nlines\0")
    session = session_of(model, template, system="be kind")
    said = ["".join(session.ask(question)) for question in ("hi", "and\n\nthen?")]
    assert said == ["Hello.", "two\n\nlines"]
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    texts = ("be kind", "hi", said[0], "and\n\nthen?", said[1], "last")
    turns = tuple(Turn(role, text) for role, text in zip(roles, texts, strict=True))
    pieces = [text for text, _ in template.pieces(Conversation((*turns, Turn("assistant", "x"))))]
    whole, asked = "".join(pieces), template.ask("last", goes_on=True).prompt
    before = whole[: whole.rindex(asked)]
    assert whole[len(before) :].startswith(asked)
    with torch.no_grad():
        _, state = model.forward_with_state(torch.tensor([BYTES.encode(before)]))
    for block, part in zip(state, session._state, strict=True):
        assert max(map(relative_error, part, block)) < 1e-5


def test_ids_are_cut_as_in_training(speak: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as the model has drawn them, and each prompt and answer for itself."""
    encoded: list[str] = []
    monkeypatch.setattr(
        BYTES, "encode", lambda text: encoded.append(text) or ByteTokenizer().encode(text), raising=False
    )
    speak(" a\n\nUser:", ">b</think>c\0")
    session = session_of(tiny_model("x070", vocab_size=257), load_template("g1"))
    list(session.ask("q"))
    session.set_thinking("off")
    list(session.ask("r"))
    assert encoded == [
        "User: q\n\nAssistant:",
        " a\n\n",
        "User: r\n\nAssistant:",
        " <think></think",
        " <think></think>b</think>c\n\n",
    ]


@pytest.mark.parametrize(
    ("answer", "stop_after", "ended", "text"),
    [
        (" yes\0", None, "said", "yes"),
        (" yes\n\nUser:", None, "said", "yes"),
        ("x" * 60, None, "too long", "x" * 60),
        (" yes", 2, "stopped", "y"),
        (" yes", 0, "nothing", ""),
        ("\0", None, "nothing", ""),
        (" \n\nUser:", None, "nothing", ""),
    ],
)
def test_why_an_answer_ends(
    answer: str, stop_after: int | None, ended: str, text: str, speak: Callable[..., None]
) -> None:
    speak(answer, " next\0")
    session = session_of(tiny_model("x070", vocab_size=257), load_template("g1"))
    before = session._state
    asked = iter(range(1000))
    # once while the prompt is read, then before each token
    is_stopped = (lambda: False) if stop_after is None else (lambda: next(asked) > stop_after)
    assert "".join(session.ask("q", is_stopped)) == text
    assert session.ended == ended
    assert (session._state is before) == (ended == "nothing")
    if stop_after is None:
        assert "".join(session.ask("r")) == "next"


def test_a_session_begins_again_as_it_began(speak: Callable[..., None]) -> None:
    session = session_of(tiny_model("x070", vocab_size=257), load_template("g1"))
    first = session.named_state()
    speak(" a\0")
    list(session.ask("q"))
    assert any(not torch.equal(first[name], x) for name, x in session.named_state().items())
    session.reset()
    assert all(torch.equal(first[name], x) for name, x in session.named_state().items())


def test_memory_is_constant() -> None:
    session = session_of(tiny_model("x070", vocab_size=257), load_template("g1"), n_tokens=8)
    sizes = set()
    for _ in range(4):
        list(session.ask("what is it?"))
        sizes.add(sum(part.untyped_storage().nbytes() for block in session._state for part in block))
    assert len(sizes) == 1


def test_the_seed_decides() -> None:
    def answers(seed: int) -> list[str]:
        session = session_of(tiny_model("x070", vocab_size=257), load_template("g1"), n_tokens=12, seed=seed)
        return ["".join(session.ask(question)) for question in ("q", "r")]

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)


def test_thinking_is_the_templates(tmp_path: Path) -> None:
    session = session_of(tiny_model("x070", vocab_size=257), template_of("plain", tmp_path))
    session.set_thinking("auto")
    with pytest.raises(ConfigError, match=r"thinking cannot be switched on: the template has no beginning"):
        session.set_thinking("on")
