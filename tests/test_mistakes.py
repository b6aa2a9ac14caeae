"""What a user's mistakes get: one clear sentence on stderr, the right exit code, and nothing half-written. Or it works.

Every case goes through the command line in this process. The tables hold the whole sentence, as it is read.
"""

# ruff: noqa: E501 -- one case of a table a line reads better

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layout_files import four_ranks, in_layout, write_folder
from tiny_models import tiny_model
from tiny_run import losses, tiny_run_config, write_config

from rwkv_cluster.cli import main
from rwkv_cluster.commands import COMMANDS
from rwkv_cluster.data.binidx import open_tokens
from rwkv_cluster.interchange.state_file import write_state
from rwkv_cluster.kernels import loader, ops
from rwkv_cluster.model.own_state import file_shapes
from rwkv_cluster.model.weights_file import load_pth, save_pth
from rwkv_cluster.tokenizer import create_vocab_file_from_tokens

Run = Callable[..., tuple[int, list[str]]]
INTEGER = "--data.tokenizer.type=integer"
VOCABULARY = ("--data.tokenizer.type=generic", "--data.tokenizer.vocab_file=v.txt")
LOCKS = {"work/.lock", "work/data/.prepare.lock"}
REMEMBERED = {"work/data/verified.json"}
PREPARED = {f"work/data/{name}" for name in ("train.bin", "train.idx", "vocab.txt", "manifest.json", "inputs.json")}


@pytest.fixture(autouse=True)
def _a_run_of_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """run.yaml in the current folder: it trains on text.jsonl into work."""
    monkeypatch.chdir(tmp_path)
    config = tiny_run_config(tmp_path, training={"max_steps": 2}, data={"validation_fraction": 0.0})
    write_config(tmp_path / "run.yaml", config)
    text = (tmp_path / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(text.replace(f"{tmp_path}/", ""))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Exit code and lines of stderr of a command. Nothing may be on stdout, and no traceback anywhere."""

    def command(*arguments: str) -> tuple[int, list[str]]:
        capfd.readouterr()
        code = main(list(arguments))
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        assert captured.out == "" or code == 0
        return code, captured.err.splitlines()

    return command


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def refused(run: Run, code: int, sentence: str, *arguments: str, leaves: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """The command fails with `code` and exactly `sentence`, changes no file and leaves no other than `leaves`."""
    before = files()
    found, lines = run(*arguments)
    assert found == code
    assert [line for line in lines if line.startswith("rwkv-cluster:")] == lines[-1:]
    assert lines[-1] == f"rwkv-cluster: error: {sentence}"
    after = files()
    assert set(after) - set(before) <= LOCKS | REMEMBERED | leaves
    may_change = LOCKS | REMEMBERED | {"work/data/inputs.json"}  # a cache, which learns of files that are seconds old
    assert {name: after[name] for name in before if name not in may_change} == {
        name: content for name, content in before.items() if name not in may_change
    }


def write(name: str, content: str | bytes | np.ndarray) -> str:
    """Write a file into the current folder and return the override that makes it the input."""
    if isinstance(content, np.ndarray):
        np.save(name, content)
    else:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"--data.inputs=[{name}]"


def line(text: Any) -> str:
    return json.dumps({"text": text}) + "\n"


FIX = "Fix the line or set data.skip_bad_lines"


@pytest.mark.parametrize(
    ("name", "content", "arguments", "sentence"),
    [
        ("e.jsonl", "", [], "no document was found in e.jsonl: the input is empty or blank. Give it some text or integers"),
        ("e.txt", " \n\n", [], "no document was found in e.txt: the input is empty or blank. Give it some text or integers"),
        ("n.jsonl", line("1 2") + line("1 1.9"), [INTEGER], "n.jsonl:2: byte 2: '1.9' is not a whole number; values must be 0 to 359. Correct the data"),
        ("n.npy", np.array([[1, 2], [3, 1.9]]), [INTEGER], "n.npy: row 1, column 1: 1.9 is not a whole number. Correct the data"),
        ("n.npy", np.array([1, np.nan]), [INTEGER], "n.npy: index 1: nan is not a whole number. Correct the data"),
        ("n.jsonl", line([1, 1.9]), [INTEGER], f'n.jsonl:1: "text" has a number that is no integer at index 1. {FIX}'),
        ("n.jsonl", line("1 -2 3"), [INTEGER], "n.jsonl:1: byte 2: '-2' is below 0; values must be 0 to 359. Correct the data"),
        ("n.npy", np.array([[1, 2], [3, -1]]), [INTEGER], "n.npy: row 1, column 1: -1 is out of range: values must be 0 to 359. Correct the data"),
        ("n.jsonl", line("1 360"), [INTEGER], "n.jsonl:1: byte 2: '360' is above 359; values must be 0 to 359. Correct the data, or raise max_value"),
        ("n.npy", np.zeros((2, 2, 2), int), [INTEGER], "n.npy has shape (2, 2, 2), expected 1 or 2 dimensions. Reshape it"),
        ("n.npy", np.array(["a"]), [INTEGER], 'n.npy holds text (dtype <U1), expected integers. Convert numbers with astype(int), or write each text as JSONL, {"text": "..."} a line'),
        ("n.npy", np.array([True]), [INTEGER], "n.npy holds booleans, expected integers. Convert it, e.g. with astype(int)"),
        ("n.npy", np.array([[1, 2], [3]], object), [INTEGER], 'n.npy holds Python objects, expected integers. Save it with astype(int), or write rows of different lengths as JSONL, {"text": [1, 2, 3]} a line'),
        ("t.csv", "id,text\n1,a\n", [], "t.csv is a table of comma-separated values, not plain text. "
         'Convert it (cat t.csv | python3 -c "import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader(sys.stdin)]" > t.jsonl) '
         "and name the column in data.text_field, or leave it out by data.file_pattern"),
        ("t.json", '[{"text": "a"}]', [], "t.json:1: is a JSON array; JSONL has one object a line. "
         "Convert the file: cat t.json | python3 -c 'import json, sys; "
         """[print(json.dumps(d if type(d) is dict else {"text": d})) for d in json.load(sys.stdin)]' > t-lines.jsonl"""),
        ("t.jsonl", "{\n", [], "t.jsonl:1: is a part of a JSON value of several lines; JSONL has one object a line. Convert the file: cat t.jsonl | jq -c . > t-lines.jsonl"),
        ("t.jsonl", line("a")[:-1] + ",", [], "t.jsonl:1: has a comma after the object; JSONL has nothing between its lines. Remove the commas at the line ends: cat t.jsonl | sed 's/,[[:space:]]*$//' > t-lines.jsonl"),
        ("t.jsonl", line("a") + "\ufeff" + line("b"), [], f"t.jsonl:2: begins with a byte order mark (BOM), as where files were joined. {FIX}"),
        ("t.jsonl", (line("a") * 2).replace("\n", "\r"), [], "t.jsonl:1: has a carriage return (CR) in it: JSONL's line ends are LF or CR LF. Convert the file: cat t.jsonl | tr '\\r' '\\n' > t-lines.jsonl"),
        ("t.jsonl", b"version https://git-lfs.github.com/spec/v1\n", [], "t.jsonl is a git-lfs pointer and not the file itself, not JSONL. Fetch the file (git lfs pull)"),
        ("t.jsonl", line("1 2") + line("one two"), [INTEGER], "t.jsonl:2: byte 0: 'one' is not a number; values must be 0 to 359. Text needs the byte or generic tokenizer"),
        ("t.jsonl", '{"txt": "a"}\n', [], f't.jsonl:1: has no field "text" (it has "txt"); data.text_field names the field to read. {FIX}'),
        ("t.jsonl", line("a") + line(5), [], f't.jsonl:2: "text" is a number, expected a string or a list of integers. {FIX}'),
        ("t.jsonl", b'{"text": "caf\xe9"}\n', [], f"t.jsonl:1: is not UTF-8 at byte 13 of the line. {FIX}"),
        ("t.txt", b"caf\xe9", [], "t.txt: is not UTF-8 text at byte 3. Convert it, or leave it out by data.file_pattern"),
        ("t.jsonl.gz", b"\x1f\x8b\x08\0", [], "t.jsonl.gz: the gzip data ends too early: the file is truncated. Make the file again"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_data_that_cannot_be_read(
    verb: str, name: str, content: Any, arguments: list[str], sentence: str, run: Run
) -> None:
    override = write(name, content)
    refused(run, 3, sentence, verb, "run.yaml", override, *arguments)


CHAT = '{"prompt": "q", "completion": "a"}\n'
CONVERSATIONS = "--data.format=conversations"
TEMPLATE = "--data.template=t.jinja"


def messages(*turns: tuple[str, Any]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "arguments", "sentence"),
    [
        ("c.jsonl", CHAT + messages(("narrator", "q")), [], f'c.jsonl:2: "messages"[0] has the role "narrator", expected system, user, assistant or tool. {FIX}'),
        ("c.jsonl", CHAT + messages(("user", "q"), ("assistant", " ")), [], f"c.jsonl:2: has an empty turn: number 2, of the assistant. {FIX}"),
        ("c.jsonl", CHAT + messages(("user", "q")), [], f"c.jsonl:2: has no answer of an assistant to train on. {FIX}"),
        ("c.jsonl", CHAT + messages(("user", [{"type": "image"}])), [], f'c.jsonl:2: "messages"[0] has a content that is not all text. {FIX}'),
        ("c.jsonl", CHAT + messages(), [], f"c.jsonl:2: has no turns. {FIX}"),
        ("c.jsonl", CHAT + '{"messages": "q"}\n', [], f'c.jsonl:2: "messages" is a string, expected a list of messages. {FIX}'),
        ("c.jsonl", CHAT + '{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "?"}]}]}', [], f'c.jsonl:2: "messages"[0] has a call that is no "name" with an object of "arguments". {FIX}'),
        ("c.jsonl", CHAT + '{"prompt": "q", "chosen": "a", "rejected": "b"}\n', [], 'c.jsonl:2: has no conversation (it has "prompt", "chosen", "rejected"), expected "messages", "conversations", '
         f'"prompt" and "completion", "instruction" and "output", or World text in "text". {FIX}'),
        ("c.jsonl", line("Once upon"), [CONVERSATIONS], f'c.jsonl:1: begins with "Once upon", expected "User:", "System:" or another speaker of World text. {FIX}'),
        ("c.jsonl", '{"input_ids": [5, 6], "labels": [6, -100]}', [], f'c.jsonl:1: "labels" has 6 at index 0 where the id is 5, expected the same or -100: labels are not shifted. {FIX}'),
        ("c.jsonl", '{"input_ids": [5, 6], "labels": [-100, -100]}', [], f'c.jsonl:1: has no token to train on: "labels" is -100 in every place. {FIX}'),
        ("c.jsonl", '{"tokens": [5, 6], "mask": [1]}', [], f'c.jsonl:1: "mask" has 1 values, and "tokens" has 2. {FIX}'),
        ("c.jsonl", '{"tokens": [5, 6]}', ["--data.format=tokens"], f'c.jsonl:1: has no "input_ids" with "labels", and no "tokens" with "mask" (it has "tokens"). {FIX}'),
        ("c.txt", "a", [CONVERSATIONS], "c.txt is no JSONL, and data.format is 'conversations'. Write one JSON object a line into a .jsonl file, or set data.format to auto"),
        ("c.jsonl", CHAT, ["--data.template=none.jinja"], "data.template is 'none.jinja', which is no file. Use g1, or name a Jinja file"),
        ("c.jsonl", CHAT, [TEMPLATE, "{{ raise_exception('Only one!') }}"], "c.jsonl:1: t.jinja cannot render it: Only one!. Correct the line or the template"),
        ("c.jsonl", CHAT, [TEMPLATE, "{{ messages | length }}"], "c.jsonl:1: cannot be told which part of its text turn 2 is: t.jinja renders what is before it otherwise when it goes on. "
         "Put {% generation %} and {% endgeneration %} around answers in the template"),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_read(
    name: str, content: str, arguments: list[str], sentence: str, run: Run
) -> None:
    options = [argument for argument in arguments if argument.startswith("--")]
    Path("t.jinja").write_text("".join(argument for argument in arguments if argument not in options))
    refused(run, 3, sentence, "prepare", "run.yaml", write(name, content), *options)


def test_a_question_that_cannot_be_asked(run: Run) -> None:
    refused(run, 2, "--template answers a question, and --prompt has none", "generate", "work", "--template", "g1")
    sentence = "data.template is 'g2', which is no file. Use g1, or name a Jinja file"
    refused(run, 3, sentence, "generate", "work", "--template", "g2", "--prompt", "q")


def test_a_template_that_is_no_jinja(run: Run) -> None:
    Path("t.jinja").write_text("a\n{% for %}")
    sentence = "t.jinja:2: Expected an expression, got 'end of statement block'. Correct the template"
    refused(run, 2, sentence, "prepare", "run.yaml", write("c.jsonl", CHAT), TEMPLATE)


def test_bad_json(run: Run) -> None:
    override = write("t.jsonl", line("a") + '{"text": "b\n')
    code, lines = run("prepare", "run.yaml", override)
    assert code == 3
    assert re.fullmatch(rf"rwkv-cluster: error: t\.jsonl:2: is not JSON: .* at character \d+\. {FIX}", lines[-1])
    assert set(files()) == {"run.yaml", "text.jsonl", "t.jsonl"} | LOCKS


def test_bad_lines_can_be_left_out(run: Run) -> None:
    override = write("t.jsonl", line("abc" * 200) + "{oops\n" + line("def" * 200))
    code, lines = run("prepare", "run.yaml", override, "--data.skip_bad_lines=true")
    assert code == 0
    assert any("1 lines were left out" in text and "t.jsonl:2" in text for text in lines)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data.inputs=[]"], "data.inputs is empty, and {folder}/work/data holds no prepared data. Name files, folders or patterns in data.inputs"),
        (["--data.inputs=[no.jsonl]"], "data.inputs: 'no.jsonl' does not exist (looked for a file, a folder, a .bin/.idx pair and a pattern, from {folder}). Correct the entry"),
        (["--data.inputs=[.]", "--data.file_pattern=*.md"], "data.inputs: '.' has no file that matches data.file_pattern '*.md'. Change the entry or the pattern"),
    ],
)  # fmt: skip
def test_inputs_that_lead_nowhere(arguments: list[str], sentence: str, run: Run, tmp_path: Path) -> None:
    refused(run, 3, sentence.format(folder=tmp_path), "train", "run.yaml", *arguments)


@pytest.mark.parametrize(
    ("vocabulary", "sentence"),
    [
        ("1 'a' 1\n2 __import__('os').system('touch pwned') 1\n", "v.txt:2: __import__('os').system('touch pwned') is not one quoted string, such as 'a', \"a\" or b'\\xff'"),
        ("1 'a' 1\n2 'b' 2\n", "v.txt:2: token 'b' is 1 bytes long, but the line says 2. Correct one"),
        ("1 's' 1\n2 'e' 1\n", "text.jsonl:1: byte 2: cannot encode 0x76 near 'seven and moves ev', because no token of v.txt fits. Add one to the vocabulary, or remove it from the text"),
        (None, "vocabulary file v.txt does not exist. Check the path"),
    ],
    ids=["code", "length", "unknown character", "missing"],
)  # fmt: skip
def test_vocabulary_files(vocabulary: str | None, sentence: str, run: Run) -> None:
    if vocabulary is not None:
        write("v.txt", vocabulary)
    refused(run, 3, sentence, "train", "run.yaml", *VOCABULARY)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model.n_embd=96", "--model.head_size_a=64"], "--model.n_embd=96: model: n_embd is 96, which is not a multiple of head_size_a 64. Use n_embd 64 or 128, or a head_size_a that divides 96"),
        (["--model.n_embd=100", "--model.head_size_a=64"], "--model.n_embd=100: model: n_embd is 100, which is not a multiple of head_size_a 64. Use n_embd 64 or 128, or a head_size_a that divides 100"),
        (["--model.model_type=x080"], "--model.model_type=x080: model.model_type is 'x080', expected x052, x060 or x070. Nearest: x070"),
        (["--model.model_type=rwkv"], "--model.model_type=rwkv: model.model_type is 'rwkv', expected x052, x060 or x070"),
        (["--model.n_lay=3"], "--model.n_lay=3: model has no field 'n_lay'. Nearest: model.n_layer"),
        (["--n_layer=3"], "--n_layer=3 is not an option of train. Nearest: model.n_layer"),
        (["--model.n_layer=0"], "--model.n_layer=0: model.n_layer is 0, expected an integer >= 1 and <= 1024"),
        (["--model.n_layer=two"], "--model.n_layer=two: model.n_layer is 'two', expected an integer >= 1 and <= 1024"),
        (["--model.vocab_size=100"], "model.vocab_size is 100, but the tokenizer has ids up to 256. Use at least 257, or leave model.vocab_size out"),
        (["--training.micro_bsz=0"], "--training.micro_bsz=0: training.micro_bsz is 0, expected an integer >= 1 and <= 65536"),
        (["--training.lr_init=.nan"], "--training.lr_init=.nan: training.lr_init is .nan, expected a number >= 0. The number must be finite"),
        (["--training.lr_init=nan"], "--training.lr_init=nan: training.lr_init is 'nan', expected a number >= 0"),
        (["--training.lr_init=-1e-3"], "--training.lr_init=-1e-3: training.lr_init is -1e-3, expected a number >= 0"),
        (["--training.max_steps=0"], "--training.max_steps=0: training.max_steps is 0, expected an integer >= 1, or null"),
        (["--training.num_epochs=0"], "--training.num_epochs=0: training.num_epochs is 0, expected an integer >= 1, or null"),
        (["--training.strategy=zero9"], "--training.strategy=zero9: training.strategy is 'zero9', expected auto, ddp, "
         "deepspeed, deepspeed_stage_0, deepspeed_stage_1, deepspeed_stage_2, deepspeed_stage_3, "
         "deepspeed_stage_1_offload, deepspeed_stage_2_offload or deepspeed_stage_3_offload"),
        (["--training.schedule=cos"], "--training.schedule=cos: training.schedule is 'cos', expected cosine, wsd, linear, constant or points"),
        (["--training.schedule=points"], "--training.schedule=points: training: schedule points needs lr_points, for instance [[0, 1e-3], [1000000, 1e-5]]. Set it"),
        (["--training.decay_steps=5"], "--training.decay_steps=5: training: decay_steps is set, which schedule cosine does not use. Remove it, or set schedule to wsd"),
        (["--training.schedule=wsd", "--training.decay_steps=5", "--training.decay_tokens=9"], "--training.decay_steps=5: training: set decay_steps or decay_tokens, not both"),
        (["--training.schedule=points", "--training.lr_points=[[5, 1], [5, 2]]"], "--training.lr_points=[[5, 1], [5, 2]]: training.lr_points: the tokens of lr_points do not ascend. Write each place once, in order"),
        (["--training.schedule=points", "--training.lr_points=[[5, 1], [6]]"], "--training.lr_points=[[5, 1], [6]]: training.lr_points: lr_points has [6.0]. Each is [tokens, learning rate], both >= 0"),
        (["--training.schedule=points", "--training.lr_points=[[5, x]]"], "--training.lr_points=[[5, x]]: training.lr_points[0][1] is 'x', expected a list of lists of numbers that is not empty, or null"),
        (["--training.global_batch_size=6"], "training.global_batch_size 6 is not a multiple of micro_bsz 4 * 1 rank = 4. Use training.global_batch_size 4 or 8, or a training.micro_bsz of 1, 2, 3 or 6"),
        (["--training.precision=fp16", "--training.accelerator=cpu"], "training.precision is fp16, which needs a CUDA device, and this run is on a CPU. Use fp32 or bf16"),
        (["--data.validation_fraction=1"], "--data.validation_fraction=1: data.validation_fraction is 1, expected a number >= 0 and < 1"),
        (["--data.tokenizer.type=bytes"], "--data.tokenizer.type=bytes: data.tokenizer.type: tokenizer type is 'bytes'. Use one of byte, integer, angle, generic, world, hf, or `package.module:ClassName`"),
        (["--data.tokenizer.type=generic"], "--data.tokenizer.type=generic: data.tokenizer: tokenizer type is 'generic' but vocab_file is not set. Name a vocabulary file"),
        (["--data.tokenizer.type=hf"], "--data.tokenizer.type=hf: data.tokenizer: tokenizer type is 'hf' but path is not set. Name a tokenizer.json, or a folder with one"),
        (["--data.tokenizer.path=t.json"], "--data.tokenizer.path=t.json: data.tokenizer: path is set, but tokenizer type is 'byte'. Use type hf, or vocab_file"),
        (["--data.tokenizer={type: hf, path: t.json, vocab_file: v}"], "--data.tokenizer={type: hf, path: t.json, vocab_file: v}: data.tokenizer: vocab_file is set, but tokenizer type is 'hf'. Name its file in path"),
        (["--data.tokenizer.added_tokens=[x]"], "--data.tokenizer.added_tokens=[x]: data.tokenizer: added_tokens is set, but tokenizer type is 'byte'. Those that take it: generic, world, hf"),
        (["--data.tokenizer={type: world, added_tokens: [x, x]}"], "--data.tokenizer={type: world, added_tokens: [x, x]}: data.tokenizer.added_tokens: added_tokens has 'x' twice. Keep one"),
        (["--data.tokenizer={type: world, added_tokens: ['']}"], "--data.tokenizer={type: world, added_tokens: ['']}: data.tokenizer.added_tokens: added_tokens has an empty text. Remove it"),
        (["--data.tokenizer.type=nowhere:Mine"], "tokenizer type is 'nowhere:Mine', but module 'nowhere' cannot be imported: No module named 'nowhere'. Install it, or put its folder on PYTHONPATH"),
        (["--training.train=[heat.weight]"], "training.train has 'heat.weight', which fits none of 69 names. One of them is head.weight; * stands for any text"),
        (["--training.train=some"], "--training.train=some: training.train is 'some', expected all, or a list of text such as [a, b]"),
        (["--training.train=[]"], "--training.train=[]: training.train: train is empty. Name parameters, or write all"),
        (["--training.lr_multipliers={head.weight: 0}"], "--training.lr_multipliers={head.weight: 0}: training.lr_multipliers: lr_multipliers has 0 for 'head.weight', expected a number > 0. To freeze parameters, leave them out of training.train"),
        (["--training.lr_multipliers={'*.lora_B': 16}"], "training.lr_multipliers has '*.lora_B', which fits none of 69 names. One of them is blocks.1.att.x_w; * stands for any text"),
        (["--adapter.kind=lorra"], "--adapter.kind=lorra: adapter.kind is 'lorra', expected none, lora, dora, pissa, miss or state. Nearest: lora"),
        (["--adapter.kind=lora", "--adapter.targets=['*.att.kex']"], "adapter.targets has '*.att.kex', which fits none of 12 names. One of them is blocks.1.att.key; * stands for any text"),
        (["--adapter.kind=miss", "--adapter.alpha=3"], "--adapter.alpha=3: adapter: alpha is set, but an adapter of kind miss has no scale. Leave alpha out"),
        (["--adapter.kind=lora", "--training.ema_decay=0.9"], "--training.ema_decay=0.9: training.ema_decay is set, which averages a whole model, and only a part is trained. Leave it out"),
        (["--adapter.kind=lora", "--training.train=[head.weight]"], "--adapter.kind=lora: adapter.kind is lora, which trains the adapter alone, and training.train names parameters of the model. Keep one"),
        ([INTEGER, "--logging.sample_prompt=def", "--logging.sample_tokens=3"], "logging.sample_prompt 'def' cannot be encoded: byte 0: 'def' is not a number; values must be 0 to 359. Text needs the byte or generic tokenizer"),
    ],
)  # fmt: skip
def test_settings_are_refused_before_anything_is_written(arguments: list[str], sentence: str, run: Run) -> None:
    refused(run, 2, sentence, "train", "run.yaml", *arguments)
    assert not Path("work").exists()


def test_the_world_vocabulary(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rwkv", raising=False)
    monkeypatch.syspath_prepend("packages")
    Path("packages/rwkv").mkdir(parents=True)
    write("packages/rwkv/__init__.py", "")
    remedy = "`pip install 'rwkv-cluster[world]'` brings it, or name the file in data.tokenizer.vocab_file"
    sentence = f"tokenizer type is 'world', but no installed package has rwkv_vocab_v20230424.txt. {remedy}"
    refused(run, 2, sentence, "train", "run.yaml", "--data.tokenizer.type=world")
    write("v.txt", "1 'a' 1\n2 'b' 1\n")
    sentence = "v.txt: its 2 tokens are not those of rwkv_vocab_v20230424.txt. Use type generic for another vocabulary"
    refused(run, 3, sentence, "train", "run.yaml", "--data.tokenizer={type: world, vocab_file: v.txt}")

    absent = f"neither {tmp_path.parent}/configs/config.yaml nor {tmp_path}/rwkv_vocab_v20230424.txt"
    said = f"w.pth does not say which tokenizer it was trained with: there is {absent}"
    rows = {257: "Name a work directory, or the tokenizer with --tokenizer and --vocab-file"}
    rows[65_536] = (
        "Its 65,536 rows are as many as World models have, whose vocabulary `pip install 'rwkv-cluster[world]'` brings, "
        "and --vocab-file names"
    )
    for vocab_size, remedy in rows.items():
        save_pth(Path("w.pth"), tiny_model("x070", vocab_size=vocab_size).state_dict())
        refused(run, 2, f"{said}. {remedy}", "generate", "w.pth")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "tokenizer t.json does not exist. Check the path"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "t.json is not JSON: it begins with 'version https://git-lfs.github'. Get the file again"),
        ('{"model_type": "rwkv7"}', 't.json is JSON, but no tokenizer: it has no "model". Name a file such as tokenizer.json'),
        ('{"model": {"type": "RwkvTrie"}}', "t.json: its model is of type 'RwkvTrie', which the package tokenizers does not have. Use type world where it is RWKV's vocabulary"),
        ('{"model": {"type": "BPE", "vocab": {"!": 0, "a": 1}, "merges": []}}', "t.json: id 0 is '!', a token of text, and here id 0 ends a document. Use one whose id 0 is a special token, as when it is trained with special_tokens=['<|endoftext|>']"),
    ],
    ids=["missing", "pointer", "config", "RwkvTrie", "id 0"],
)  # fmt: skip
def test_tokenizers_of_the_hub(content: str | None, sentence: str, run: Run) -> None:
    if content is not None:
        write("t.json", content)
    refused(run, 3, sentence, "train", "run.yaml", "--data.tokenizer={type: hf, path: t.json}")


def test_a_folder_without_a_tokenizer_and_a_machine_without_the_package(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("hub").mkdir()
    command = ("train", "run.yaml", "--data.tokenizer={type: hf, path: hub}")
    remedy = "Name a folder with one, or use type world where it is one of RWKV's vocabulary"
    refused(run, 3, f"folder hub has no tokenizer.json. {remedy}", *command)
    write("hub/tokenizer.json", "{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    sentence = (
        "tokenizer type is 'hf', but the package tokenizers cannot be imported: import of tokenizers halted; None in "
        "sys.modules. `pip install 'rwkv-cluster[hf]'` installs it"
    )
    refused(run, 2, sentence, *command)


def test_moments_in_8_bits(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("train", "run.yaml", "--training.optimizer=adamw8bit")
    place = f"run.yaml:{1 + Path('run.yaml').read_text().splitlines().index('  adam_eps: 1e-18')}: training"
    sentence = (
        f"{place}: adam_eps is 1e-18, by which optimizer adamw8bit would divide where a second moment is rounded "
        "to zero. Set it to 1e-08 or more"
    )
    refused(run, 2, sentence, *command)
    command = (*command, "--training.adam_eps=1e-8")
    sentence = (
        "--training.optimizer=adamw8bit: training: optimizer adamw8bit keeps its moments in blocks, which ZeRO stage 2 "
        "would cut. Use strategy ddp, or optimizer adamw"
    )
    refused(run, 2, sentence, *command, "--training.zero_stage=2")
    monkeypatch.setitem(sys.modules, "torchao", None)
    sentence = (
        "8-bit AdamW needs the package torchao, which cannot be imported: import of torchao halted; None in sys.modules. "
        "`pip install 'rwkv-cluster[torchao]'` installs it"
    )
    refused(run, 2, sentence, *command)


def test_a_resume_with_another_optimizer(run: Run, tmp_path: Path) -> None:
    assert run("train", "run.yaml")[0] == 0
    sentence = (
        f"{tmp_path}/work/out/checkpoints/step-00000002 was trained with other settings: training.optimizer: adamw -> "
        "lion. Put them back to continue, or choose another work_dir for a new run"
    )
    refused(run, 2, sentence, "train", "run.yaml", "--training.max_steps=4", "--training.optimizer=lion")


def test_a_range_test_of_the_learning_rate(run: Run, tmp_path: Path) -> None:
    absent = f"{tmp_path}/work/data/manifest.json does not exist: the data is not prepared"
    refused(run, 3, f"{absent}. Run `rwkv-cluster prepare CONFIG`", "lr-find", "run.yaml")
    assert run("prepare", "run.yaml")[0] == 0
    sentence = "rates from 1 to 0.1 in 100 steps are no range. Use 0 < --from < --to <= 100 and 2 to 1,000 --steps"
    refused(run, 2, sentence, "lr-find", "run.yaml", "--from=1", "--to=0.1")
    sentence = "lr-find computes in bf16 or fp32. Add --training.precision=bf16"
    refused(run, 2, sentence, "lr-find", "run.yaml", "--training.precision=fp16")
    sentence = "the loss is not finite at a learning rate of 99. Use a smaller --from"
    refused(
        run, 1, sentence, "lr-find", "run.yaml", "--from=99", "--to=100", "--steps=2", "--training.weight_decay=1e38"
    )


def test_an_unknown_key_in_the_file_is_named_with_its_line(run: Run) -> None:
    Path("wrong.yaml").write_text("work_dir: work\nmodel:\n  n_layers: 3\ntrainings: {}\n")
    code, lines = run("train", "wrong.yaml")
    assert code == 2
    assert lines == [
        "rwkv-cluster: error: wrong.yaml:3: model has no field 'n_layers'. Nearest: model.n_layer",
        "wrong.yaml:4: the configuration has no field 'trainings'. Nearest: training",
    ]


def test_no_config(run: Run) -> None:
    assert run("train") == (2, [
        "usage: rwkv-cluster train [-h] [--json] [--profile [STEPS]] CONFIG",
        "rwkv-cluster train: error: the following arguments are required: CONFIG",
    ])  # fmt: skip
    assert run("train", "--profile", "run.yaml") == (2, [
        "usage: rwkv-cluster train [-h] [--json] [--profile [STEPS]] CONFIG",
        "rwkv-cluster train: error: argument --profile: 'run.yaml' is not a number of steps. Write CONFIG before it",
    ])  # fmt: skip
    code, lines = run("train", "other.yaml")
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith("rwkv-cluster: error: other.yaml: there is no such file. ")
    assert "Name a YAML file, the work directory of a run, or a shipped recipe: " in lines[0]
    assert not Path("work").exists()


VERBS = f"Verbs: {', '.join(COMMANDS)}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], f"no verb given. {VERBS}; --help explains them"),
        (["trian", "x.yaml"], "'trian' is not a verb. Nearest: train"),
        (["zzz"], f"'zzz' is not a verb. {VERBS}"),
        (["train", "run.yaml", "--work-dir", "x"], "--work-dir is not an option of train. Nearest: work_dir"),
        (["train", "run.yaml", "--model.n_layer"], "--model.n_layer needs a value: --model.n_layer=VALUE"),
        (["train", "run.yaml", "--model.n_layer", "--json"], "--model.n_layer needs a value: --model.n_layer=VALUE"),
        (["train", "run.yaml", "other.yaml"], "other.yaml is not an argument of train. See rwkv-cluster train --help"),
        (["config", "run.yaml", "--model.n_lay=3"], "--model.n_lay=3: model has no field 'n_lay'. Nearest: model.n_layer"),
        (["generate", "w", "--model.n_layer=3"], "--model.n_layer=3 is not an argument of generate. See rwkv-cluster generate --help"),
        (["generate", "w", "--tokens=0"], "--tokens is 0, expected an integer >= 1"),
        (["generate", "w", "--temperature=-1"], "--temperature is -1, expected a number >= 0"),
        (["generate", "w", "--temperature=nan"], "--temperature is nan, expected a number >= 0"),
        (["generate", "w", "--top-p=0"], "--top-p is 0, expected a number > 0 and <= 1"),
        (["generate", "w", "--top-p=1.5"], "--top-p is 1.5, expected a number > 0 and <= 1"),
        (["generate", "w", "--seed=-1"], "--seed is -1, expected an integer >= 0 and <= 2^63 - 1"),
        (["generate", "w", "--prompt=\udcff"], "--prompt is not UTF-8 text. Check the terminal's encoding"),
        (["plan", "run.yaml", "--ranks", "0"], "--ranks is '0', expected an integer from 1 to 1,000,000"),
        (["plan", "run.yaml", "--ranks", "two"], "--ranks is 'two', expected an integer from 1 to 1,000,000"),
        (["plan", "run.yaml", "--ranks", "99999999999"], "--ranks is '99999999999', expected an integer from 1 to 1,000,000"),
        (["plan", "run.yaml", "--mfu", "40", "--gpu", "h100"], "--mfu is '40', expected a number > 0 and <= 1"),
        (["plan", "run.yaml", "--mfu", "0.4"], "--mfu needs the GPU's peak. Give --gpu NAME or --peak-tflops P"),
        (["plan", "run.yaml", "--mfu", "0.4", "--gpu", "h100", "--tokens-per-s", "9"], "--mfu and --tokens-per-s both say the speed. Give one of them"),
        (["plan", "run.yaml", "--tokens-per-s", "nan"], "--tokens-per-s is 'nan', expected a number > 0"),
        (["plan", "run.yaml", "--gpu-memory-gb", "-1"], "--gpu-memory-gb is '-1', expected a number > 0"),
        (["plan", "run.yaml", "--gpu", "h1000"], "--gpu is 'h1000', which is not in the table. Nearest: h100; or give the numbers themselves"),
        (["plan", "run.yaml", "--training.global_batch_size=6", "--ranks", "4"], "training.global_batch_size 6 is not a multiple of micro_bsz 4 * 4 ranks = 16. Use training.global_batch_size 16"),
        (["plan", "run.yaml", "--model.vocab_size=10"], "model.vocab_size is 10, but the tokenizer has ids up to 256. Use at least 257, or leave model.vocab_size out"),
        (["new", "--output", "n.yaml"], "--task is not given. Name the task, one of sft, lora, state, continue or pretrain"),
        (["new", "--output", "run.yaml"], "run.yaml exists. Name another file by --output"),
        (["new", "--output", "n.yaml", "--task", "lora", "--base", "w", "--data", "text.jsonl"], "--gpu is not given. Name the GPU, such as rtx-4090 or h100"),
        (["new", "--output", "n.yaml", "--task", "rl", "--base", "text.jsonl", "--data", "text.jsonl", "--gpu", "l4"], "--task is 'rl'. Use sft, lora, state, continue, pretrain"),
        (["new", "--output", "n.yaml", "--task", "pretrain", "--base", "3b", "--data", "text.jsonl", "--gpu", "l4"], "--base is '3b', and pretrain begins from nothing. Name a released size: 0.1b, 0.4b, 1.5b, 2.9b, 7.2b, 13.3b"),
        (["new", "--output", "no/n.yaml", "--task", "pretrain", "--base", "0.1b", "--data", "text.jsonl", "--gpu", "h100"], "--output no/n.yaml cannot be written: No such file or directory. Name another file"),
        (["new", "--output", "n.yaml", "--task", "pretrain", "--base", "1.5b", "--data", "text.jsonl", "--gpu", "l4", "--nodes", "two"], "--nodes is 'two', expected an integer from 1 to 9,999"),
        (["new", "--output", "n.yaml", "--task", "pretrain", "--base", "1.5b", "--data", "text.jsonl", "--gpu", "l4", "--time", "soon"], "--time is 'soon', expected a number with its unit, such as 90m, 12h or 2d"),
        (["plan", "run.yaml", "--fit"], "--fit needs the GPU's memory and rates. Give --gpu NAME"),
        (["plan", "run.yaml", "--fit", "--gpu", "h100", "--training.accelerator=cpu"], "--fit is for GPUs, and training.accelerator is cpu. Set it to auto or cuda"),
        (["plan", "run.yaml", "--gpus", "2", "--ranks", "2"], "--ranks is given beside --gpus, --nodes or --fit. Give --gpus and --nodes alone"),
        (["plan", "run.yaml", "--gpus", "two"], "--training.devices=two: training.devices is 'two', expected an integer >= 1 and <= 1024"),
        (["plan", "run.yaml", "--fit", "--gpu", "l4", "--model.n_layer=2", "--model.n_embd=16384", "--training.precision=fp16"], "no setting of this run fits l4 (24 GB) on 1 rank: the smallest (one process, micro_bsz 4, grad_cp 0) needs 110.9 GB. It would fit h200, b200; or use more GPUs, a shorter model.ctx_len, an adapter or a smaller model"),
        (["bench", "ddp", "--ranks", "2", "0"], "--ranks is 0, expected an integer >= 1"),
        (["bench", "ddp", "--strategies", "single", "--ranks", "2"], "--strategies single is for one rank. Add another strategy, or --ranks 1"),
        (["bench", "wkv", "--width", "8", "--head-size", "3"], "--width 8 is not a multiple of --head-size 3."),
        (["doctor", "--training.zero_stage=2"], "training.zero_stage=2 is a field of a run. Name its CONFIG too"),
        (["status", "none"], "{folder}/none: there is no run: it has no configs/config.yaml, prepared data, lock or launch. Name the work directory of a run"),
        (["report", "none"], "{folder}/none: there is no run to report on: it has no logs/metrics.jsonl and no configs/config.yaml. Name the work directory of a run"),
    ],
)  # fmt: skip
def test_a_wrong_command_line(arguments: list[str], sentence: str, run: Run, tmp_path: Path) -> None:
    assert run(*arguments) == (2, [f"rwkv-cluster: error: {sentence.format(folder=tmp_path)}"])
    assert set(files()) == {"run.yaml", "text.jsonl"}


def test_data_is_no_configuration(run: Run) -> None:
    sentence = (
        "text.jsonl is data, and not the YAML file of a run. Name such a file, or a shipped recipe (quickstart.yaml, sft-g1.yaml, state-g1.yaml, or one in continue/, integers/, long/, lora/, pretrain/, sft/, state/), and "
        "the data by data.inputs: --data.inputs=[text.jsonl]"
    )
    refused(run, 2, sentence, "prepare", "text.jsonl")


@pytest.mark.parametrize(
    ("content", "ctx_len", "n_tokens", "remedy"),
    [
        (line("ab"), 32, 3, "a model.ctx_len of at most 1"),
        (line("a"), 32, 2, "at least 3 tokens"),
        (line("abc" * 30), 1000, 91, "a model.ctx_len of at most 30"),
        (line("abc" * 30), 90, 91, "a model.ctx_len of at most 30, or data.order=all"),
    ],
)
def test_too_little_data(content: str, ctx_len: int, n_tokens: int, remedy: str, run: Run) -> None:
    arguments = ["train", "run.yaml", write("t.jsonl", content)]
    sentence = (
        f"the prepared data has {n_tokens} tokens, too few for ctx_len {ctx_len}: {3 * ctx_len} are needed. "
        f"Add data, or use {remedy}"
    )
    refused(run, 3, sentence, *arguments, f"--model.ctx_len={ctx_len}", leaves=PREPARED)
    if n_tokens >= 3:
        assert run(*arguments, f"--model.ctx_len={n_tokens // 3}")[0] == 0


REMEDY = "Run `rwkv-cluster init --force` to make it anew, or choose another work_dir"


def test_a_truncated_init_file(run: Run, tmp_path: Path) -> None:
    run("init", "run.yaml")
    path = tmp_path / "work/out/rwkv-init.pth"
    path.write_bytes(path.read_bytes()[:1000])
    sentence = f"{path} cannot start this run: damaged or truncated: File is not a zip file. Use another copy. {REMEDY}"
    refused(run, 4, sentence, "train", "run.yaml", leaves=PREPARED)
    assert run("init", "run.yaml", "--force")[0] == 0
    assert run("train", "run.yaml")[0] == 0


def test_the_initial_weights_of_another_model(run: Run, tmp_path: Path) -> None:
    run("init", "run.yaml", "--model.n_embd=64")
    sentence = (
        f"{tmp_path}/work/out/rwkv-init.pth cannot start this run: it holds another model (n_embd 64, this run has 32; "
        f"dim_att 64, this run has 32; dim_ffn 256, this run has 128). {REMEDY}"
    )
    refused(run, 4, sentence, "train", "run.yaml", leaves=PREPARED)


def test_the_work_dir_of_another_run(run: Run, tmp_path: Path) -> None:
    run("train", "run.yaml")
    checkpoint = f"{tmp_path}/work/out/checkpoints/step-00000002"
    refused(run, 2, f"{checkpoint} was trained with other settings: model.n_embd: 32 -> 64; global batch size: 4 -> 5. "
            "Put them back to continue, or choose another work_dir for a new run",
            "train", "run.yaml", "--model.n_embd=64", "--training.micro_bsz=5")  # fmt: skip
    override = write("other.jsonl", line("other text " * 90))
    refused(run, 3, "the data has to be prepared anew (the content of other.jsonl changed), "
            f"but {checkpoint} was trained on the data that is there. "
            "Put the inputs and data settings back to continue, or go on with the data that is there by --data.inputs=[]; "
            "for a new run choose another work_dir",
            "train", "run.yaml", override)  # fmt: skip


def test_a_branch_of_what_is_not_there(run: Run, tmp_path: Path) -> None:
    run("train", "run.yaml")
    refused(run, 4, f"{tmp_path}/work/out/checkpoints has no checkpoint of step 1. Steps that are there: 2",
            "branch", "work", "new", "--at", "1")  # fmt: skip
    refused(run, 2, f"{tmp_path}/work exists already. Name a new directory for the branch",
            "branch", "work", "work", "--at", "2")  # fmt: skip
    refused(run, 2, "--training.schedul=wsd: training has no field 'schedul'. Nearest: training.schedule",
            "branch", "work", "new", "--at", "2", "--set", "training.schedul=wsd")  # fmt: skip
    assert run("branch", "work", "new", "--at", "2", "--set", "training.max_steps=3")[0] == 0
    write("more.jsonl", line("more text " * 90))
    refused(run, 3, f"the data has to be prepared anew (the content of more.jsonl changed), but {tmp_path}/new/data is that of the run "
            "that this one has branched off. Put the inputs and data settings back, or go on with the data that is there "
            "by --data.inputs=[]; other data needs a new work_dir, with training.init_from",
            "train", "new", "--data.inputs=[more.jsonl]", leaves={"new/.lock"})  # fmt: skip


def test_an_average_of_nothing(run: Run, tmp_path: Path) -> None:
    run("train", "run.yaml")
    refused(run, 4, f"{tmp_path}/work/out/checkpoints has no checkpoint of step 7. Steps that are there: 2",
            "average", "work", "--steps", "7")  # fmt: skip
    refused(run, 2, f"{tmp_path}/work/out/checkpoints/step-00000002 alone has no average. Name at least two, or two steps",
            "average", "work")  # fmt: skip
    refused(run, 2, "weights of several places have no place of their own. Name a file by --output",
            "average", "work", "work/out/rwkv-init.pth")  # fmt: skip


def test_data_that_was_deleted_is_prepared_again_from_the_same_input(run: Run, tmp_path: Path) -> None:
    run("train", "run.yaml", "--training.max_steps=4", "--work_dir=whole")
    assert run("train", "run.yaml")[0] == 0
    shutil.rmtree("work/data")
    text = Path("text.jsonl").read_bytes()
    Path("text.jsonl").write_bytes(text + line("more").encode())
    code, lines = run("train", "run.yaml")
    assert code == 3
    assert re.fullmatch(
        r"rwkv-cluster: error: the inputs now give other data \(fingerprint \w{16}\) than this run was trained on "
        r"\(\w{16}\)\. Put the inputs and data settings back to continue, or choose another work_dir for a new run",
        lines[-1],
    )
    assert [path.name for path in Path("work/data").iterdir()] == [".prepare.lock"]
    Path("text.jsonl").write_bytes(text)
    assert run("train", "run.yaml", "--training.max_steps=4")[0] == 0
    assert losses("work") == losses("whole")


@pytest.mark.parametrize("gone", ["text.jsonl", pytest.param("texts", marks=pytest.mark.system)])
def test_a_run_goes_on_when_its_input_is_gone(gone: str, run: Run, tmp_path: Path) -> None:
    Path("texts").mkdir()
    shutil.copy("text.jsonl", "texts")
    inputs = f"--data.inputs=[{gone}]"
    run("train", "run.yaml", "--training.max_steps=4", "--work_dir=whole", inputs)
    assert run("train", "run.yaml", inputs)[0] == 0
    Path("text.jsonl").unlink()
    Path("texts/text.jsonl").unlink()
    code, lines = run("train", "run.yaml", "--training.max_steps=4", inputs)
    assert code == 0
    assert any(f"Going on with the data that was prepared from it, in {tmp_path}/work/data" in text for text in lines)
    assert losses("work") == losses("whole")
    sentence = (
        f"data.inputs: 'other.jsonl' does not exist (looked for a file, a folder, a .bin/.idx pair and a pattern, from "
        f"{tmp_path}). Correct the entry. Or go on with the data that is prepared in {tmp_path}/work/data: "
        "--data.inputs=[]"
    )
    refused(run, 3, sentence, "train", "run.yaml", "--data.inputs=[other.jsonl]")
    assert run("train", "run.yaml", "--training.max_steps=5", inputs, "--data.text_field=other")[0] == 3
    assert run("train", "run.yaml", "--training.max_steps=5", "--data.inputs=[]")[0] == 0


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "no such weights file. Check the path"),
        (lambda path: path.write_bytes(b"junk"), "not a weights file: starts with b'junk', wanted b'PK\\x03\\x04'"),
        (lambda path: path.mkdir(), "a folder without weights: it has nothing, expected one of model.safetensors, model.safetensors.index.json, pytorch_model.bin. Name a weights file or its folder"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "it is a Git LFS pointer and not the weights. Run `git lfs pull` where it was cloned"),
        (lambda path: path.write_bytes(b"<!doctype html>"), "it is a web page (HTML), not the weights. Download the file itself: on Hugging Face from /resolve/, not /blob/"),
        (lambda path: path.write_bytes(b"GGUF" + bytes(99)), "it is a GGUF file. Use the .pth that it was made from, in bf16, fp16 or fp32"),
        (lambda path: torch.save({"state": {}, "param_groups": []}, path), "it is the state of an optimizer, not weights. Name the weights that were saved beside it"),
        (lambda path: save_pth(path, {"blocks.0.att.time_state": torch.ones(2)}), "weights cannot be used: they are a state alone, and no model. Name the weights that it was made for; generate, chat and eval take the state by --state"),
        (lambda path: save_pth(path, {"blocks.0.att.key.lora_A": torch.ones(2)}), "weights cannot be used: they hold a LoRA that is not merged ('blocks.0.att.key.lora_A'). Merge it into the weights that it was trained on"),
        (lambda path: save_pth(path, {"blocks.0.ffn.s_emb.weight": torch.ones(2)}), "weights cannot be used: they are those of RWKV-7a, which has an embedding in every block (DeepEmbed) ('blocks.0.ffn.s_emb.weight'), which is not supported. Use weights of RWKV-7 (x070)"),
        (lambda path: save_pth(path, {"blocks.0.qkv.k1": torch.ones(2)}), "weights cannot be used: they are those of RWKV-7b ('blocks.0.qkv.k1'), which is not supported. Use weights of RWKV-7 (x070)"),
        (lambda path: save_pth(path, {"blocks.0.rosa.emb": torch.ones(2)}), "weights cannot be used: they are those of an RWKV with ROSA ('blocks.0.rosa.emb'), which is not supported. Use weights of RWKV-7 (x070)"),
        (lambda path: save_pth(path, {"blocks.0.ffn.enn.weight": torch.ones(2)}), "weights cannot be used: they are those of a draft of RWKV-8 ('blocks.0.ffn.enn.weight'), which is not supported. Use weights of RWKV-7 (x070)"),
        (lambda path: save_pth(path, {"a": torch.ones(2)}), "weights are not those of an RWKV: found a, expected emb.weight, blocks.0.*"),
    ],
)  # fmt: skip
def test_init_from_what_is_no_weights_file(make: Callable[[Path], None], sentence: str, run: Run) -> None:
    """Told before the data is prepared, which may take hours."""
    make(Path("other.pth"))
    told = f"other.pth cannot start this run: {sentence}. training.init_from names it"
    refused(run, 4, told, "train", "run.yaml", "--training.init_from=other.pth")
    assert not Path("work/data/manifest.json").exists()


def test_doctor_looks_at_the_initial_weights() -> None:
    Path("other.pth").write_bytes(b"junk")
    assert main(["doctor", "run.yaml", "--training.init_from=other.pth"]) == 4
    assert not Path("work/data/manifest.json").exists()


def test_init_from_weights_with_too_few_rows(run: Run) -> None:
    save_pth(Path("w.pth"), tiny_model("x070", vocab_size=256).state_dict())
    said, ending = "w.pth cannot start this run: it has 256 vocabulary rows", "training.init_from names it"
    remedy = (
        "fewer than the tokenizer has ids (257): use the tokenizer that the weights were trained with, or set "
        "training.new_rows"
    )
    refused(run, 4, f"{said}, {remedy}. {ending}", "train", "run.yaml", "--training.init_from=w.pth")
    remedy = "and the tokenizer 257 ids without added_tokens. Use the tokenizer that the weights were trained with"
    command = ("train", "run.yaml", "--training.init_from=w.pth", "--training.new_rows=mean")
    refused(run, 4, f"{said}, {remedy}. {ending}", *command)


def test_init_from_weights_with_other_rows_than_the_tokenizer_has_ids(run: Run) -> None:
    run("init", "run.yaml", "--model.vocab_size=320", "--work_dir=big")
    weights = "--training.init_from=big/out/rwkv-init.pth"
    refused(run, 4, "big/out/rwkv-init.pth cannot start this run: it has 320 vocabulary rows, of which the tokenizer uses "
            "257. Set model.vocab_size=320. training.init_from names it",
            "train", "run.yaml", weights, "--model.vocab_size=257")  # fmt: skip
    refused(run, 4, "big/out/rwkv-init.pth cannot start this run: it has 320 vocabulary rows, fewer than the tokenizer has "
            "ids (361): use the tokenizer that the weights were trained with, or set training.new_rows. "
            "training.init_from names it",
            "train", "run.yaml", weights, INTEGER)  # fmt: skip
    assert run("train", "run.yaml", weights)[0] == 0


def test_init_from_weights_of_another_model_than_the_file_says(run: Run) -> None:
    run("init", "run.yaml", "--work_dir=base", "--model.decay_lora_rank=24")
    weights = "--training.init_from=base/out/rwkv-init.pth"
    sentence = (
        "base/out/rwkv-init.pth cannot start this run: it holds another model (n_layer 2, this run has 3; decay_lora_rank 24, "
        "this run has 32). Leave model.n_layer, model.decay_lora_rank out, and the weights say it"
    )
    other = ("--model.n_layer=3", "--model.decay_lora_rank=32")
    for command in ("train", "init", "config", "plan"):
        refused(run, 4, sentence, command, "run.yaml", weights, *other)


@pytest.mark.system
def test_the_same_initial_weights_under_another_name(run: Run, tmp_path: Path) -> None:
    run("init", "run.yaml", "--work_dir=base", "--training.random_seed=7")
    run("init", "run.yaml", "--work_dir=base2", "--training.random_seed=8")
    shutil.copy("base/out/rwkv-init.pth", "b.pth")
    assert run("train", "run.yaml", "--training.init_from=b.pth")[0] == 0
    shutil.copy("b.pth", "copy.pth")
    Path("link.pth").symlink_to("b.pth")
    for number, name in enumerate([f"{tmp_path}/b.pth", "./b.pth", "link.pth", "copy.pth"]):
        assert run("train", "run.yaml", f"--training.init_from={name}", f"--training.max_steps={number + 3}")[0] == 0
    Path("b.pth").unlink()
    assert run("train", "run.yaml", "--training.init_from=copy.pth", "--training.max_steps=8")[0] == 0
    assert run("train", "run.yaml", "--training.init_from=copy.pth", "--training.max_steps=9")[0] == 0
    code, lines = run("train", "run.yaml", "--training.init_from=base2/out/rwkv-init.pth", "--training.max_steps=9")
    assert code == 2
    assert "training.init_from: copy.pth -> base2/out/rwkv-init.pth" in lines[-1]


def test_inspect_claims_nothing_that_is_not_in_the_file(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run("init", "run.yaml")
    assert main(["inspect", "work/out/rwkv-init.pth"]) == 0
    assert "ctx_len" not in (said := capfd.readouterr().out)
    assert "n_layer" in said


def test_a_work_dir_stands_for_itself_without_its_vocabulary_file(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    characters = sorted(set(Path("text.jsonl").read_text() + "\u2028\"' \\#"))
    create_vocab_file_from_tokens([c for c in characters if c != "\n"], "v.txt")
    assert run("train", "run.yaml", *VOCABULARY)[0] == 0
    command = ["generate", "../work", "--prompt", "we", "--tokens", "9", "--seed", "3"]
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    capfd.readouterr()
    assert main(command) == 0
    said = capfd.readouterr().out
    monkeypatch.chdir("..")
    assert main(["generate", "work", *command[2:]]) == 0
    assert capfd.readouterr().out == said
    Path("work/data/vocab.txt").write_text("1 'a' 1\n")  # another one: the manifest's digest tells, and v.txt is there
    assert main(["generate", "work", *command[2:]]) == 0
    assert capfd.readouterr().out == said
    Path("v.txt").unlink()
    code, lines = run("generate", "work", *command[2:])
    assert (code, lines[-1]) == (3, "rwkv-cluster: error: vocabulary file v.txt does not exist. Check the path")


def test_a_work_dir_that_is_a_file(run: Run, tmp_path: Path) -> None:
    Path("work").write_text("mine")
    refused(run, 2, f"work_dir {tmp_path}/work cannot be made: Not a directory at {tmp_path}/work/data. "
            "Choose a directory that you may write to", "train", "run.yaml")  # fmt: skip


def test_results_of_a_run_that_has_not_been(run: Run, tmp_path: Path) -> None:
    code, lines = run("eval", "run.yaml")
    assert (code, len(lines)) == (3, 1)
    assert "the data is not prepared" in lines[0]
    sentence = "work does not exist. Name the work directory of a run, or a weights file"
    refused(run, 4, sentence, "generate", "work")
    Path("work").mkdir()
    sentence = "work: a folder without weights: it has nothing, expected one of model.safetensors, model.safetensors.index.json, "
    refused(run, 4, sentence + "pytorch_model.bin. Name a weights file or its folder", "generate", "work")
    Path("work/out").mkdir()
    sentence = (
        "work does not say which tokenizer it was trained with: there is neither work/configs/config.yaml nor work/"
    )
    sentence += "rwkv_vocab_v20230424.txt. Name a work directory, or the tokenizer with --tokenizer and --vocab-file"
    refused(run, 2, sentence, "generate", "work")
    refused(run, 4, "no.pth: no such weights file. Check the path", "inspect", "no.pth")


def test_a_token_file_that_is_cut_off(run: Run) -> None:
    run("prepare", "run.yaml")
    content = Path("work/data/train.bin").read_bytes()
    Path("old.idx").write_bytes(Path("work/data/train.idx").read_bytes())
    override = write("old.bin", content[:-100])
    before = files()
    code, lines = run("train", "run.yaml", override, "--work_dir=new")
    assert code == 3
    assert lines[-1].startswith("rwkv-cluster: error: old.")
    assert str(len(content) - 100) in lines[-1].replace(",", "")
    assert set(files()) - set(before) <= {"new/.lock", "new/data/.prepare.lock"}


@pytest.mark.parametrize("name", ["train.bin", pytest.param("train.idx", marks=pytest.mark.system)])
def test_a_flipped_bit_in_a_token_file(name: str, run: Run, tmp_path: Path) -> None:
    for work in ("work", "undisturbed"):
        run("train", "run.yaml", f"--work_dir={work}")
    more = ("train", "run.yaml", "--training.max_steps=3")
    path = tmp_path / "work/data" / name
    good = path.read_bytes()
    path.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
    digests = [hashlib.sha256(content).hexdigest()[:12] for content in (path.read_bytes(), good)]
    sentence = (
        f"{path} is damaged: it is not what was prepared (sha256 {digests[0]}..., expected {digests[1]}...). "
        "Make it again from its input with `rwkv-cluster prepare CONFIG`"
    )
    refused(run, 3, sentence, *more)
    code, lines = run("prepare", "run.yaml")
    assert code == 0
    assert f"preparing data in {path.parent}: {path} is damaged" in lines[0]
    assert path.read_bytes() == good
    assert run(*more)[0] == run(*more, "--work_dir=undisturbed")[0] == 0
    assert losses("work") == losses("undisturbed")


@pytest.mark.parametrize(("name", "command"), [("train", ["train", "run.yaml"]), ("val", ["eval", "work"])])
def test_an_id_outside_the_vocabulary(name: str, command: list[str], run: Run, tmp_path: Path) -> None:
    """As a larger tokenizer leaves it, with a manifest to it."""
    held_out = "--data.validation_fraction=0.5"
    run("train", "run.yaml", held_out)
    path = tmp_path / f"work/data/{name}.bin"
    ids = np.fromfile(path, np.uint16)
    ids[:] = 60_000
    old = hashlib.sha256(path.read_bytes()).hexdigest()
    ids.tofile(path)
    manifest = path.parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace(old, hashlib.sha256(path.read_bytes()).hexdigest()))
    shutil.rmtree("work/out/checkpoints")
    code, lines = run(*command, *([held_out] if name == "train" else []))
    assert code == 3
    assert lines[-1].startswith(f"rwkv-cluster: error: {path}: document ")
    assert lines[-1].endswith(
        ": id 60000 is not in the tokenizer's vocabulary, 0 to 256. Use the tokenizer that made it, or make it again"
    )


def test_eval_with_the_weights_of_a_smaller_vocabulary(run: Run, tmp_path: Path) -> None:
    run("train", "run.yaml", "--data.validation_fraction=0.1")
    numbers = ["--data.tokenizer.max_value=20", INTEGER, "--work_dir=small"]
    assert run("train", "run.yaml", write("n.jsonl", line("1 2 3 4 5 6 7 8 " * 40)), *numbers)[0] == 0
    refused(run, 4, "small/out/rwkv-final.pth has 22 vocabulary rows, but the tokens in "
            f"{tmp_path}/work/data are ids up to 256. Use weights that were trained with the tokenizer of this data",
            "eval", "work", "--weights", "small/out/rwkv-final.pth")  # fmt: skip


@pytest.mark.system
def test_a_flipped_bit_in_the_validation_file_does_not_give_another_loss(run: Run, tmp_path: Path) -> None:
    run("train", "run.yaml", "--data.validation_fraction=0.1")
    path = tmp_path / "work/data/val.bin"
    path.write_bytes(b"\x02" + path.read_bytes()[1:])
    code, lines = run("eval", "work")
    assert code == 3
    assert f"{path} is damaged" in lines[-1]
    code = main(["doctor", "run.yaml", "--data.validation_fraction=0.1"])
    assert code == 3


# What crashes, or does something else in silence, elsewhere, and simply works here.


@pytest.mark.parametrize(
    "arguments",
    [
        ["--training.micro_bsz=11"],
        ["--training.micro_bsz=256", "--model.ctx_len=8"],
        ["--model.n_layer=1"],
        ["--model.n_embd=96"],
        ["--model.n_embd=96", "--model.model_type=x060", "--model.head_size_a=32"],
        ["--model.n_layer=1", "--model.model_type=x052"],
        ["--training.precision=bf16"],
        ["--training.warmup_steps=0"],
    ],
    ids=" ".join,
)
def test_any_size_trains(arguments: list[str], run: Run) -> None:
    assert run("train", "run.yaml", *arguments)[0] == 0
    assert len(losses("work")) == 2


@pytest.mark.parametrize("warmup_steps", [2, 3, 10_000])
def test_data_smaller_than_the_warm_up_still_trains(warmup_steps: int, run: Run) -> None:
    assert run("train", "run.yaml", f"--training.warmup_steps={warmup_steps}", "--training.max_steps=3")[0] == 0
    assert len(losses("work")) == 3
    first, final = (load_pth(Path(f"work/out/rwkv-{label}.pth")) for label in ("init", "final"))
    assert any(not torch.equal(first[name], final[name]) for name in first)
    records = [json.loads(text) for text in Path("work/logs/metrics.jsonl").read_text().splitlines()]
    assert all(record["lr"] > 0 for record in records)


def test_tokens_above_65535(run: Run) -> None:
    override = write("n.npy", np.full((4, 100), 70_000))
    assert run("prepare", "run.yaml", override, INTEGER, "--data.tokenizer.max_value=70000")[0] == 0
    tokens = open_tokens(Path("work/data/train")).tokens
    assert (tokens.dtype, int(tokens.max())) == (np.dtype("int32"), 70_001)


def test_a_stray_weights_file_is_not_taken_for_the_run(run: Run) -> None:
    assert run("train", "run.yaml", "--work_dir=clean")[0] == 0
    assert run("prepare", "run.yaml")[0] == 0  # whose directory is no stranger's any more
    strays = [Path("work/out/rwkv-7.pth"), Path("work/out/rwkv-final.pth"), Path("work/out/model.pth")]
    save_pth(strays[0], {"emb.weight": torch.zeros(2, 2)})
    for path in strays[1:]:
        path.write_bytes(b"stray")
    content = strays[0].read_bytes()
    assert run("train", "run.yaml")[0] == 0
    assert (strays[0].read_bytes(), strays[2].read_bytes()) == (content, b"stray")
    assert strays[1].read_bytes() == Path("clean/out/rwkv-final.pth").read_bytes()


def test_a_directory_name_means_nothing(run: Run) -> None:
    assert run("train", "run.yaml", "--work_dir=world/14b-run1 $(touch pwned)")[0] == 0
    assert Path("world/14b-run1 $(touch pwned)/out/rwkv-final.pth").exists()
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("--training.wkv_backend=fla", 'wkv_backend "fla" is Triton code and needs a GPU, and this run is on a CPU. Use wkv_backend "auto"'),
        ("--training.wkv_backend=native", 'Nothing compiled. Build it. wkv_backend "native" needs a compiled kernel; "auto" takes what there is.'),
        ("--training.fused=native", 'Nothing compiled. Build it. training.fused "native" needs them; "auto" takes what there is.'),
    ],
)  # fmt: skip
def test_a_kernel_that_is_not_here_is_refused_before_anything_is_prepared(
    run: Run, override: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "cpu", lambda: loader.Missing("Nothing compiled", "Build it"))
    refused(run, 5, sentence, "train", "run.yaml", override)
    assert not Path("work").exists()


def test_without_a_library_a_run_trains_all_the_same(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ops._tell.cache_clear()
    monkeypatch.setattr(loader, "cpu", lambda: loader.Missing("Nothing compiled", "Build it"))
    code, lines = run("train", "run.yaml")
    ops._tell.cache_clear()
    assert code == 0
    assert (
        sum("Nothing compiled. Build it. Until then WKV runs in PyTorch, in chunked form." in line for line in lines)
        == 1
    )


STORED = "work/configs/config.yaml names the tokenizer spied:Spied, whose module would be imported, and a work directory may be somebody else's. If you trust that module, name it yourself: "


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work directory of somebody else, whose file names a module that leaves a trace when it is imported."""
    Path("spied.py").write_text(
        "open('imported', 'w').close()\nfrom rwkv_cluster.tokenizer import ByteTokenizer as Spied\n"
    )
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "spied", raising=False)
    Path("work/configs").mkdir(parents=True)
    path = Path("work/configs/config.yaml")
    path.write_text("data: {tokenizer: {type: spied:Spied, vocab_file: v w}}\n")
    return path


@pytest.mark.parametrize("verb", ["train", "prepare", "init", "plan", "doctor", "eval", "launch"])
def test_a_stored_tokenizer_class_is_not_imported_unasked(verb: str, run: Run, stored: Path) -> None:
    refused(run, 2, f"{STORED}--data.tokenizer.type=spied:Spied", verb, "work")
    assert run("config", "work")[0] == 0
    assert run("consolidate", "work")[0] == 4
    assert not Path("imported").exists()


@pytest.mark.parametrize("source", ["work", "work/out/x.pth"])
def test_generate_does_not_import_what_a_stored_file_names(source: str, run: Run, stored: Path) -> None:
    Path("work/out").mkdir()
    Path("work/out/x.pth").touch()
    sentence = STORED.replace("work/", f"{Path.cwd()}/work/") if source != "work" else STORED
    refused(run, 2, f"{sentence}--tokenizer spied:Spied --vocab-file 'v w'", "generate", source)
    assert not Path("imported").exists()


def test_a_stored_tokenizer_class_is_used_when_the_command_line_names_it(run: Run, stored: Path) -> None:
    stored.write_text("data: {tokenizer: {type: spied:Spied}}\n")
    assert run("plan", "work", "--data.tokenizer.type=spied:Spied")[0] == 0
    assert Path("imported").exists()


def test_a_stored_launch_section_runs_nothing_unasked(run: Run, stored: Path) -> None:
    stored.write_text(
        "launch:\n  setup: ['touch ran']\n  python: /tmp/mine\n  env: {LD_PRELOAD: x.so}\n  container: {image: i}\n"
    )
    fields = "launch.setup, launch.env, launch.python, launch.container.image"
    sentence = f"work/configs/config.yaml sets {fields}, which decides what runs, and a work directory may be somebody else's. Read that file; if you trust it, name it: `rwkv-cluster launch work/configs/config.yaml --work_dir=work`"
    refused(run, 2, sentence, "launch", "work")
    assert run("launch", "work/configs/config.yaml", "--work_dir=work", "--dry-run")[0] == 0
    stored.write_text("launch: {setup: ['touch ran'], num_nodes: 1}\n")
    assert run("launch", "work", "--dry-run", "--launch.setup=[echo]")[0] == 0
    assert not Path("ran").exists()


def test_files_of_another_program_are_left_alone(run: Run, tmp_path: Path) -> None:
    for name in ("work/out/rwkv-final.pth", "work/logs/metrics.csv", "work/data/train.bin", "work/data/vocab.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("mine")
    sentence = f"work_dir {tmp_path}/work holds files that no run of rwkv-cluster has made, and a run would overwrite them: logs/metrics.csv, out/rwkv-final.pth, data/train.bin. Choose another work_dir, or move them away"
    refused(run, 2, sentence, "train", "run.yaml")


def test_a_folder_or_a_link_where_a_file_belongs(run: Run, tmp_path: Path) -> None:
    Path("work/STOP").mkdir(parents=True)
    refused(
        run,
        2,
        f"{tmp_path}/work/STOP is a folder, and a run has a regular file of that name. Remove it, or move it away",
        "train",
        "run.yaml",
    )
    Path("work/STOP").rmdir()
    Path("victim").write_text("precious")
    Path("work/logs").mkdir()
    Path("work/logs/tensorboard").write_text("x")
    refused(
        run,
        2,
        f"{tmp_path}/work/logs/tensorboard is a file, and a run has a folder of that name. Remove it, or move it away",
        "train",
        "run.yaml",
    )
    Path("work/logs/tensorboard").unlink()
    Path("work/.lock").symlink_to("../victim")
    refused(
        run,
        2,
        f"{tmp_path}/work/.lock is a symbolic link, and a run has a regular file of that name. Remove it, or move it away",
        "train",
        "run.yaml",
    )


EXPORTS = [
    (["--format", "flo"], "--format flo is not a format. Nearest: fla"),
    (["--format", "fla", "--dtype", "fp8"], "--dtype is fp8, expected bf16, fp16 or fp32"),
    (["--format", "st", "--dtype", "bf16"], "--dtype is bf16, and st exists in fp16 only. Leave --dtype out"),
    (["--format", "safetensors", "--merged"], "w.pth has no adapter to be merged. Export its weights as they are: `rwkv-cluster export w.pth --format pth`"),
    (["--format", "peft", "--dtype", "bf16"], "--dtype does not go with --format peft, which is the adapter alone, in fp32. Leave it out"),
    (["--format", "pth"], "{cwd}/w.pth is what would be exported. Name another --output"),
    (
        ["--format", "transformers"],
        "the head size is 16, with which Rwkv7ForCausalLM computes other logits: its group norm has 1e-5 times the head size where RWKV-LM has 64e-5. Export as fla, whose config.json can correct it",
    ),
    (
        ["--format", "gguf-folder"],
        "llama.cpp's converter takes RWKV-7 with the World vocabulary only, and the model's is not known to be it. Where it is, name its file: --vocab-file rwkv_vocab_v20230424.txt",
    ),
    (
        ["--format", "safetensors", "--output", "there"],
        "there exists with another content: it, 1 bytes, would be replaced. Name another --output, or replace it with --force",
    ),
    (["--format", "fla", "--output", "there"], "there exists and is no folder that an export writes. Name another --output"),
    (["--format", "fla", "--output", "."], ". holds run.yaml, which is no file of an export. Name another --output"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "sentence"), EXPORTS)
def test_an_export_that_cannot_be(options: list[str], sentence: str, run: Run) -> None:
    save_pth(Path("w.pth"), tiny_model("x070").state_dict())
    Path("there").write_text("x")
    refused(run, 2, sentence.format(cwd=Path.cwd()), "export", "w.pth", *options)


def test_a_merge_of_what_has_no_adapter(run: Run) -> None:
    save_pth(Path("w.pth"), tiny_model("x070").state_dict())
    sentence = (
        "w.pth has no adapter to be merged. Export its weights as they are: `rwkv-cluster export w.pth --format pth`"
    )
    refused(run, 2, sentence, "merge", "w.pth", "--output", "x.pth")


def test_an_export_of_what_no_program_reads(run: Run) -> None:
    save_pth(Path("w.pth"), tiny_model("x060").state_dict())
    sentence = "no program reads x060 as fla. Formats of x060: pth, safetensors, st"
    refused(run, 2, sentence, "export", "w.pth", "--format", "fla")
    sentence = f"{Path.cwd()}/work has no trained weights: no checkpoint and no rwkv-final.pth. Train first: `rwkv-cluster train CONFIG`, or name weights"
    Path("work/out").mkdir(parents=True)
    refused(run, 4, sentence, "export", "work", "--format", "fla")


def test_folders_of_weights_that_are_not_whole(run: Run) -> None:
    model = Path("m")
    write_folder(model, in_layout(four_ranks(), "fla"), n_files=2)
    second, index = model / "model-00002-of-00002.safetensors", model / "model.safetensors.index.json"
    refused(run, 4, f"{second}: it is one of 2 files of one model. Name their folder: m", "inspect", str(second))
    second.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    pointer = f"{second}: it is a Git LFS pointer and not the weights. Run `git lfs pull` where it was cloned"
    refused(run, 4, pointer, "inspect", "m")
    second.unlink()
    refused(run, 4, f"{index}: it names '{second.name}', which is not there. Download that file too", "inspect", "m")
    index.unlink()
    beginning = "m: it has model-00001-of-00002.safetensors, but no model.safetensors.index.json"
    refused(run, 4, f"{beginning}, which says what is in which file. Download that too", "inspect", "m")


def test_folders_without_weights(run: Run) -> None:
    folder = Path("m")
    folder.mkdir()
    names = "model.safetensors, model.safetensors.index.json, pytorch_model.bin"
    ending = f"expected one of {names}. Name a weights file or its folder"
    refused(run, 4, f"m: a folder without weights: it has nothing, {ending}", "inspect", "m")
    (folder / "m.gguf").write_bytes(b"GGUF")
    refused(run, 4, f"m: a folder without weights: it has 'm.gguf', {ending}", "inspect", "m")
    (folder / "adapter_config.json").write_text("{}")
    adapter = "m: it is the folder of an adapter (it has adapter_config.json), not a model"
    refused(run, 4, f"{adapter}. Merge it into the weights that it was trained on", "inspect", "m")
    (folder / "out").mkdir()
    refused(run, 4, "m: it is the work directory of a run. Name its weights: m/out/rwkv-final.pth", "inspect", "m")


def test_states_that_are_none_or_another_models(run: Run) -> None:
    save_pth(Path("w.pth"), tiny_model("x070", vocab_size=257).state_dict())
    shapes = file_shapes(tiny_model("x070", n_layer=3), with_shifts=False)
    write_state(Path("s.pth"), {name: torch.zeros(shape) for name, shape in shapes.items()})
    sentence = "s.pth: it is a state of 3 layers, and the model has 2. Name the model that it was made for"
    refused(run, 4, sentence, "generate", "w.pth", "--tokenizer", "byte", "--state", "s.pth")
    sentence = "w.pth: it has no tensors blocks.*.att.time_state, so it is no state. Name a file of state tuning, or one that /save of chat has written"
    refused(run, 4, sentence, "chat", "w.pth", "--tokenizer", "byte", "--state", "w.pth")


def test_a_conversation_that_cannot_be(run: Run) -> None:
    save_pth(Path("w.pth"), tiny_model("x070", vocab_size=257).state_dict())
    sentence = "chat has no result for --json. generate --template g1 --json answers one question"
    refused(run, 2, sentence, "chat", "w.pth", "--json")
    Path("t.jinja").write_text("{% for m in messages %}{{ m.content }};{% endfor %}")
    sentence = "thinking cannot be switched on: the template has no beginning of an answer for it. Use --template g1, or leave it to the model"
    options = ("--tokenizer", "byte", "--template", "t.jinja", "--think", "on")
    refused(run, 2, sentence, "chat", "w.pth", *options)
