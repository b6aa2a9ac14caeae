"""What a model is trained on in conversations: a table written by hand, and ids as inference makes them.

In the table [[ and ]] enclose what is trained on, and <0> is the end of the document.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepared_files import content, marked_documents, plain_config, write_rows

from rwkv_cluster.data.conversations.template import load_template
from rwkv_cluster.data.preparation import tokenize
from rwkv_cluster.data.preparation.prepare import prepare, reason_to_prepare
from rwkv_cluster.errors import ConfigError, DataError, MissingDataError
from rwkv_cluster.interchange.export.tokenizer_files import CHAT_TEMPLATE
from rwkv_cluster.tokenizer import ByteTokenizer, world_file, world_tokenizer

BYTES = ByteTokenizer()
needs_world = pytest.mark.skipif(world_file() is None, reason="needs the package rwkv")


def said(*turns: str, **fields: Any) -> dict[str, Any]:
    """A row of messages: user and assistant in turn, after a system's that begins with "s:"."""
    system = [{"role": "system", "content": turns[0][2:]}] if turns[0].startswith("s:") else []
    rest = turns[len(system) :]
    spoken = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(rest)]
    return {"messages": system + spoken, **fields}


CALL = {"type": "function", "function": {"name": "sum", "arguments": '{"a": 1, "b": [2, "é"]}'}}
SUM = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "sum", "description": "Adds", "parameters": SUM}}

TABLE = [
    ("one turn", said("Hi", "Hello."), "User: Hi\n\nAssistant:[[ Hello.<0>]]"),
    (
        "several turns and a system",
        said("s:Be brief.", "a?", "A.", "b?", "B."),
        "System: Be brief.\n\nUser: a?\n\nAssistant:[[ A.\n\n]]User: b?\n\nAssistant:[[ B.<0>]]",
    ),
    (
        "CRLF and long blank lines",
        said("s: \r\nA\r\n\r\n\r\nB \n", "\n\nline 1\r\n\n\n\nline 2\n", "\nfirst\r\n\r\nsecond\n\n"),
        "System: A\nB\n\nUser: line 1\nline 2\n\nAssistant:[[ first\n\nsecond<0>]]",
    ),
    ("unicode", said("你好 🙂é", "再见\u2028!"), "User: 你好 🙂é\n\nAssistant:[[ 再见\u2028!<0>]]"),
    (
        "thinks in the text",
        said("1+1? (think)", "<think>\nOne\n\nand one.\n</think>\n2"),
        "User: 1+1? (think)\n\nAssistant:[[ <think>\nOne\n\nand one.\n</think>\n2<0>]]",
    ),
    (
        "thinks in a field, and an empty thought",
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "reasoning_content": "hm\n"},
                {"role": "user", "content": "r"},
                {"role": "assistant", "content": "<think></think>\nb", "reasoning_content": ""},
            ]
        },
        "User: q\n\nAssistant:[[ <think>\nhm\n</think>\na\n\n]]User: r\n\nAssistant:[[ <think></think>\nb<0>]]",
    ),
    (
        "tools",
        {
            "tools": [TOOL, {"name": "now"}],
            "messages": [
                {"role": "user", "content": "Add"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": '{"sum":\n\n3}'},
                {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
            ],
        },
        'System: Tools:\n[\n{"name":"sum","description":"Adds","arguments":{"a":{"type":"integer"},'
        '"b":{"type":"array"}}},\n{"name":"now","arguments":{}}\n]\nReturn only a JSON function call.\n\n'
        "User: Add\n\nAssistant:"
        '[[ ```json\n{"name":"sum","arguments":{"a":1,"b":[2,"é"]}}\n```\n\n]]'
        'User: Function output:\n{"sum":\n3}\n\nAssistant:[[ 3<0>]]',
    ),
    (
        "ShareGPT that ends with a question",
        {
            "system": "S",
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
                {"from": "human", "value": "more?"},
            ],
        },
        "System: S\n\nUser: q\n\nAssistant:[[ a\n\n]]User: more?<0>",
    ),
    (
        "Alpaca",
        {"instruction": "Translate.", "input": "cat", "output": "chat", "history": [["q", "a"]]},
        "User: q\n\nAssistant:[[ a\n\n]]User: Translate.\ncat\n\nAssistant:[[ chat<0>]]",
    ),
    ("prompt and completion", {"prompt": "p", "completion": " c "}, "User: p\n\nAssistant:[[ c<0>]]"),
    (
        "an answer of weight 0",
        {
            "messages": [
                {"role": "assistant", "content": "Welcome"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "bad", "weight": 0},
                {"role": "user", "content": "r"},
                {"role": "assistant", "content": "good"},
            ]
        },
        "Assistant:[[ Welcome\n\n]]User: q\n\nAssistant: bad\n\nUser: r\n\nAssistant:[[ good<0>]]",
    ),
    (
        "World text",
        {
            "text": "System: s\r\n\r\nUser: q 1\n\nq 2\nAssistant: no\n\nAssistant: a 1\n\na 2\n\nUser: r\n\n"
            "Assistant: b\n"
        },
        "System: s\n\nUser: q 1\nq 2\nAssistant: no\n\nAssistant:[[ a 1\n\na 2\n\n]]User: r\n\nAssistant:[[ b<0>]]",
    ),
    (
        "older World text",
        {"text": "Instruction: Translate.\n\nInput: cat\n\nResponse: chat"},
        "User: Translate.\ncat\n\nAssistant:[[ chat<0>]]",
    ),
    (
        "questions and answers",
        {"text": "Q: q\n\nA: a\n\nQ: r\n\nA: b"},
        "User: q\n\nAssistant:[[ a\n\n]]User: r\n\nAssistant:[[ b<0>]]",
    ),
    (
        "messages on both sides",
        {"prompt": said("q", "a", "r")["messages"], "completion": [{"role": "assistant", "content": "b"}]},
        "User: q\n\nAssistant: a\n\nUser: r\n\nAssistant:[[ b<0>]]",
    ),
]


def prepared(
    folder: Path, rows: list[dict[str, Any]], tokenizer: Any, **options: Any
) -> list[tuple[list[int], list[int]]]:
    path = write_rows(folder / "rows.jsonl", *rows)
    prepare(plain_config(path, format="conversations", **options), tokenizer, folder / "out")
    return marked_documents(folder / "out")


def shown(ids: list[int], bits: list[int]) -> str:
    """Byte ids as the table writes them."""
    edges = np.flatnonzero(np.diff([0, *bits, 0])).tolist()
    parts = []
    for start, stop in zip([0, *edges], [*edges, len(ids)], strict=True):
        part = BYTES.decodeBytes(ids[start:stop]).decode() + "<0>" * (0 in ids[start:stop])
        parts.append(f"[[{part}]]" if start < stop and bits[start] else part)
    return "".join(parts)


@pytest.mark.parametrize(("row", "expected"), [case[1:] for case in TABLE], ids=[case[0] for case in TABLE])
def test_answers_are_trained_on_and_nothing_else(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    (document,) = prepared(tmp_path, [row], BYTES)
    assert shown(*document) == expected


@pytest.mark.system  # the package reads its vocabulary in Python, which takes seconds
@needs_world
def test_ids_are_those_that_inference_makes(tmp_path: Path) -> None:
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER  # the program that will run the model

    runtime = TRIE_TOKENIZER(str(world_file()))
    documents = prepared(tmp_path, [row for _, row, _ in TABLE], world_tokenizer(None))
    for (ids, bits), (name, _, expected) in zip(documents, TABLE, strict=True):
        text = expected.removesuffix("<0>").replace("<0>]]", "]]")
        asked, *answers = text.replace("Assistant: ", "Assistant:[[ ").replace("]]", "[[").split("[[")
        wanted = list(runtime.encode(asked))
        for part in answers:
            if part.startswith(" "):
                prompt = ids[: len(wanted)]
                assert prompt == runtime.encode(runtime.decode(prompt)), name  # also where all is encoded at once
            wanted += runtime.encode(part)
        assert ids == [*wanted, 0], name
        trained = [token for token, bit in zip(ids, bits, strict=True) if bit]
        spans = [part for n, part in enumerate(text.replace("]]", "[[").split("[[")) if n % 2]
        ends = [0] if expected.endswith("<0>]]") else []
        assert trained == [token for span in spans for token in runtime.encode(span)] + ends, name


def test_all_is_trained_on_where_that_is_asked_for(tmp_path: Path) -> None:
    rows = [row for _, row, _ in TABLE]
    some = prepared(tmp_path, rows, BYTES)
    every = prepared(tmp_path, [*rows, said("no answer")], BYTES, train_on="all")
    assert [ids for ids, _ in every[:-1]] == [ids for ids, _ in some]
    assert not (tmp_path / "out" / "train.mask").exists()


def test_the_first_row_tells_and_text_stays_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    world = write_rows(tmp_path / "world.jsonl", {"text": "User: q\n\nAssistant: a", "messages": []})
    chat = write_rows(tmp_path / "chat.jsonl", said("q", "a"))
    chat.write_bytes(b"not JSON\n\n" + chat.read_bytes())
    config = plain_config(world, chat, skip_bad_lines=True)
    manifest = prepare(config, BYTES, tmp_path / "out")
    text, conversation = marked_documents(tmp_path / "out")
    assert text == ([*BYTES.encode("User: q\n\nAssistant: a"), 0], [1] * 22)
    assert shown(*conversation) == "User: q\n\nAssistant:[[ a<0>]]"
    assert manifest.options["rows"] == "conversations+text"
    assert str(chat) in caplog.text
    assert str(world) not in caplog.text
    assert reason_to_prepare(config, BYTES, tmp_path / "out") is None


def test_processes_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [said(f"question {n}", f"answer {n}" * (n % 7 + 1)) for n in range(500)]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    options = {"shuffle": True, "validation_fraction": 0.1}
    prepare(plain_config(path, num_workers=1, **options), BYTES, tmp_path / "one")
    monkeypatch.setattr(tokenize, "_BYTES_WORTH_WORKERS", 1)
    monkeypatch.setattr("rwkv_cluster.data.inputs.readers._BLOCK_BYTES", 1000)
    prepare(plain_config(path, num_workers=3, **options), BYTES, tmp_path / "three")
    assert content(tmp_path / "one") == content(tmp_path / "three")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"messages": "q"},
        {"messages": ["q"]},
        {"messages": [{"role": "narrator", "content": "q"}]},
        {"messages": [{"content": "q"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        said("q"),
        said("q", " "),
        said(" ", "a"),
        said("q", "a", tools="[1]"),
        said("q", "a", tools=[{"name": "f", "parameters": "x"}]),
        said("s: "),
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "1"}]},
            ]
        },
        {"instruction": "i", "output": "o", "history": ["q"]},
        {"instruction": "i", "output": "o", "history": 1},
        {"prompt": "p", "completion": 5},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"text": "no turns"},
        {"text": "He said:\n\nUser: q\n\nAssistant: a"},
        said("q", "\ud800"),
    ],
)
def test_a_bad_row_is_refused_with_its_place_or_counted(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "a.jsonl", said("q", "a"), row)
    config = plain_config(path, format="conversations")
    with pytest.raises(DataError, match=r"a\.jsonl:2: ") as refused:
        prepare(config, BYTES, tmp_path / "out")
    assert refused.value.exit_code == 3
    skipping = plain_config(path, format="conversations", skip_bad_lines=True)
    assert prepare(skipping, BYTES, tmp_path / "out").n_bad_lines == 1


CHATML = """{% for message in messages %}
{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}
{%- if not loop.last %}{{ '\\n' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '\\n<|assistant|>' }}{% endif %}"""
BLOCKS = """{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }};{% endgeneration %}
{% else %}{{ m.role }}:{{ m.content | tojson }}{{ tools | length if tools else '' }}
{% endif %}{% endfor %}"""


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|user|>q<|end|>\n<|assistant|>[[a<|end|>]]\n<|user|>é<|end|>\n<|assistant|>[[b<|end|><0>]]"),
        (BLOCKS, 'user:"q"\nA:[[a;]]user:"é"\nA:[[b;<0>]]'),
    ],
)
def test_a_jinja_file_is_a_template(tmp_path: Path, template: str, expected: str) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(template)
    (document,) = prepared(tmp_path, [said("q", "a", "é", "b")], BYTES, template=str(file))
    assert shown(*document) == expected


def test_exported_chat_templates_make_the_same_text(tmp_path: Path) -> None:
    names = ("one turn", "several turns and a system", "unicode", "thinks in the text", "Alpaca", "World text")
    rows = [row for name, row, _ in TABLE if name in names]
    file = tmp_path / "chat.jinja"
    file.write_text(CHAT_TEMPLATE)
    jinja = prepared(tmp_path, rows, BYTES, template=str(file))
    assert [ids for ids, _ in jinja] == [ids for ids, _ in prepared(tmp_path, rows, BYTES)]
    assert load_template(str(file)).ask("q\n\n1").prompt == load_template("g1").ask("q\n\n1").prompt


@pytest.mark.parametrize(
    ("template", "error", "place"),
    [
        ("{% for %}", ConfigError, r"chat\.jinja:1: "),
        ("{{ raise_exception('no') }}", DataError, r"rows\.jsonl:1: .*no"),
        ("{{ messages[9].content }}", DataError, r"rows\.jsonl:1: "),
        ("{{ ''.__class__.__mro__ }}", DataError, r"rows\.jsonl:1: "),
        ("{{ messages | length }}", DataError, r"rows\.jsonl:1: .*generation"),
    ],
)
def test_a_wrong_template_is_refused(tmp_path: Path, template: str, error: type[Exception], place: str) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(template)
    with pytest.raises(error, match=place):
        prepared(tmp_path, [said("q", "a")], BYTES, template=str(file))
    with pytest.raises(MissingDataError):
        prepared(tmp_path, [said("q", "a")], BYTES, template=str(tmp_path / "none"))


def test_what_decides_the_text_is_compared(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", said("q", "a"))
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    config = plain_config(path, template=str(file))
    prepare(config, BYTES, tmp_path / "out")
    assert reason_to_prepare(config, BYTES, tmp_path / "out") is None
    changed = config.__replace__(train_on="all"), config.__replace__(template="g1"), config.__replace__(format="text")
    for other in changed:
        assert reason_to_prepare(other, BYTES, tmp_path / "out") is not None
    file.write_text(CHATML + "!")
    assert reason_to_prepare(config, BYTES, tmp_path / "out") is not None
