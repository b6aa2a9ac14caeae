"""An answer is what the model says until the document ends or its template goes on, without the prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VERSIONS, some_tokens, tiny_model
from tiny_run import tiny_run_config

from rwkv_cluster.data.conversations.template import load_template
from rwkv_cluster.interchange.state_file import write_state
from rwkv_cluster.model.generate import read
from rwkv_cluster.model.own_state import named_state
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.weights_file import save_pth
from rwkv_cluster.tokenizer import ByteTokenizer
from rwkv_cluster.train import evaluate, fit, sample
from rwkv_cluster.train.checkpoint.weights import load_model, model_from_weights
from rwkv_cluster.train.evaluate import evaluate_run
from rwkv_cluster.train.run import train
from rwkv_cluster.train.session import Session

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


class CublasError(RuntimeError):
    """As torch raises it for cuBLAS without memory: a RuntimeError with this in its text."""

    def __str__(self) -> str:
        return "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize("has_room", [True, False])
@pytest.mark.parametrize(("kind", "shortage"), [("none", torch.cuda.OutOfMemoryError), ("state", CublasError)])
def test_the_last_sample_is_made_where_the_run_was_trained(
    kind: str,
    shortage: type[Exception],
    has_room: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In its precision; where the GPU has no room, on the CPU in fp32. The GPU is the CPU here."""
    caplog.set_level(logging.INFO, logger="rwkv_cluster")
    made: list[tuple[str, torch.dtype]] = []
    texts: list[str | None] = []

    def load(source: Path, *, device: str, dtype: torch.dtype) -> RWKV:
        made.append((device, dtype))
        if device == "cuda" and not has_room:
            raise shortage
        return load_model(source, dtype=dtype)

    def sample_of(session: Session, tokenizer: object) -> str | None:
        texts.append(last_sample(session, tokenizer))
        placement = replace(session.placement, accelerator="cuda")
        texts.append(last_sample(replace(session, placement=placement), tokenizer))
        return None

    last_sample = fit._last_sample
    monkeypatch.setattr(fit, "load_model", load)
    monkeypatch.setattr(fit, "_last_sample", sample_of)
    training = {"max_steps": 1, "precision": "bf16"}
    train(tiny_run_config(tmp_path, training=training, adapter={"kind": kind}, logging={"sample_tokens": 3}))
    on_cpu, on_gpu = ("cpu", torch.float32), ("cuda", torch.bfloat16)
    assert made == [on_cpu, on_gpu] + [on_cpu] * (not has_room)
    assert len(texts) == 2
    assert has_room or texts[0] == texts[1]
    assert ("made on the CPU" in caplog.text) != has_room


@pytest.mark.parametrize("fits", [True, False])
def test_generate_and_eval_take_16_bits_where_a_gpu_has_no_room_for_fp32(
    fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a conversation's state, too. The GPU is the CPU here."""
    config = tiny_run_config(tmp_path, training={"max_steps": 1}, logging={"sample_tokens": 0})
    train(config)
    root, state, expected = Path(config.work_dir), tmp_path / "state.pth", evaluate_run(config)
    model = load_model(root)
    _, after = read(model, BYTES.encode("some text"), model.initial_state(1))
    write_state(state, named_state(model, after))
    of_state = evaluate_run(config, state=state)
    assert of_state.loss != expected.loss
    made: list[tuple[str, torch.dtype]] = []

    def on_cpu(*arguments: Any, device: str, dtype: torch.dtype, **options: Any) -> RWKV:
        made.append((device, dtype))
        return model_from_weights(*arguments, **options, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << (40 if fits else 20), 1 << 40))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    evaluate_here = evaluate.evaluate
    monkeypatch.setattr(
        evaluate,
        "evaluate",
        lambda *args, **options: evaluate_here(*args, **{**options, "device": torch.device("cpu")}),
    )
    for module in (sample, evaluate):
        monkeypatch.setattr(module, "model_from_weights", on_cpu)
    for own, wanted in ((None, expected), (state, of_state)):
        assert evaluate_run(config, state=own).loss == pytest.approx(wanted.loss, rel=0 if fits else 1e-3)
        assert sample.generate_text(root, "a", state=own, **OPTIONS).startswith("a")
    assert made == [("cuda", torch.float32 if fits else torch.bfloat16)] * 4


@pytest.mark.parametrize("model_type", VERSIONS)
def test_a_model_is_loaded_in_any_precision(model_type: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    model = tiny_model(model_type).bfloat16()
    save_pth(path, model.state_dict(), torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = load_model(path, dtype=dtype)
        expected = model.to(dtype).state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
        assert {tensor.dtype for tensor in loaded.parameters()} == {dtype}
        tokens = some_tokens(1, 9)
        assert torch.equal(loaded(tokens), model(tokens))
