"""An answer is what the model says until the document ends or its template goes on, without the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import tiny_model

from rwkv_cluster.data.conversations.template import load_template
from rwkv_cluster.tokenizer import ByteTokenizer
from rwkv_cluster.train import sample

BYTES = ByteTokenizer()
OPTIONS = {"n_tokens": 40, "temperature": 0.0, "top_p": 1.0, "seed": 0}


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (" Hello.\0 more", "Hello."),
        (" one\n\ntwo\n\nUser: q", "one\n\ntwo"),
        (" User: no turn\0", "User: no turn"),
        (" long" * 9, (" long" * 8).strip()),
    ],
)
def test_an_answer_ends_with_the_document_or_before_the_next_question(
    said: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def stream(model: object, prompt_ids: list[int], **options: object) -> Iterator[int]:
        asked.append(prompt_ids)
        yield from (0 if character == "\0" else ord(character) + 1 for character in said)
        pytest.fail("went on after the answer's end")

    monkeypatch.setattr(sample, "stream", stream)
    question = load_template("g1").ask(" q\n\n1 ")
    assert sample.answer(tiny_model("x070"), BYTES, question, **OPTIONS) == answer
    assert asked == [BYTES.encode("User: q\n1\n\nAssistant:")]


@pytest.mark.parametrize("answer", ["{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"])
def test_a_jinja_template_says_what_ends_an_answer(answer: str, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}<a>" + answer + "</a>{% else %}<u>{{ m.content }}</u>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    assert load_template(str(file)).ask("q") == ("<u>q</u><a>", "</a>")
