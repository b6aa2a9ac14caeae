"""Generation: equals the model run over the whole text, is seeded, and samples what it says."""

import pytest
import torch
from tiny_models import VERSIONS, some_tokens, tiny_model

from rwkv_cluster.errors import ConfigError, TrainingError
from rwkv_cluster.model import generate as generate_module
from rwkv_cluster.model.generate import generate, sample


def greedy_by_the_whole_text(model, prompt, n_tokens):
    text = list(prompt)
    with torch.no_grad():
        for _ in range(n_tokens):
            text.append(model(torch.tensor([text]))[0, -1].argmax().item())
    return text[len(prompt) :]


@pytest.mark.parametrize("model_type", VERSIONS)
def test_greedy_equals_the_whole_text(model_type, monkeypatch):
    monkeypatch.setattr(generate_module, "PROMPT_CHUNK", 7)
    model = tiny_model(model_type)
    prompt = some_tokens(1, 17)[0].tolist()
    found = generate(model, prompt, 12, temperature=0, stop_token=None)
    assert found == greedy_by_the_whole_text(model, prompt, 12)
    assert len(set(found)) > 1


def test_an_empty_prompt_starts_a_document():
    model = tiny_model("x070")
    assert generate(model, [], 6, temperature=0, stop_token=None) == generate(
        model, [0], 6, temperature=0, stop_token=None
    )


def test_the_seed_decides():
    model = tiny_model("x070")

    def run(seed):
        return generate(model, [1], 30, seed=seed, top_p=1.0, stop_token=None)

    torch.manual_seed(5)
    first = run(1)
    assert first == run(1)
    assert first != run(2)


def test_the_stop_token_ends_and_is_not_part():
    model = tiny_model("x060")
    endless = generate(model, [3], 40, stop_token=None, top_p=1.0)
    assert len(endless) == 40
    stop = endless[5]
    assert generate(model, [3], 40, stop_token=stop, top_p=1.0) == endless[: endless.index(stop)]
    assert generate(model, [3], 0) == []


def test_bf16_and_training_attributes_do_not_matter():
    model = tiny_model("x070")
    model.grad_cp = True
    model.compute_dtype = torch.bfloat16
    assert len(generate(model, [1, 2], 5, stop_token=None)) == 5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_memory_is_constant(monkeypatch):
    model = tiny_model("x052")
    sizes = []
    original = model.forward_last

    def recording(tokens, state):
        logits, state = original(tokens, state)
        sizes.append(sum(part.untyped_storage().nbytes() for block in state for part in block))
        return logits, state

    monkeypatch.setattr(model, "forward_last", recording)
    generate(model, list(range(40)), 20, stop_token=None)
    assert len(sizes) == 20
    assert set(sizes) == {2 * (32 + 2 * 16 * 16 + 32) * 4}  # blocks * (shift + wkv + shift) * bytes


def frequencies(logits, temperature, top_p, n=4000):
    generator = torch.Generator().manual_seed(0)
    drawn = [sample(logits, temperature, top_p, generator) for _ in range(n)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / n


def test_sampling_follows_the_distribution():
    probabilities = torch.tensor([0.1, 0.5, 0.05, 0.35])
    logits = probabilities.log()
    torch.testing.assert_close(frequencies(logits, 1.0, 1.0), probabilities, atol=0.03, rtol=0)
    # 0.5 + 0.35 reaches 0.8; then the temperature squares
    wanted = torch.tensor([0, 0.25, 0, 0.1225]) / 0.3725
    torch.testing.assert_close(frequencies(logits, 0.5, 0.8), wanted, atol=0.03, rtol=0)
    assert frequencies(logits, 1.0, 1e-9, 50)[1] == 1
    assert frequencies(logits, 0.0, 1.0, 50)[1] == 1
    assert sample(torch.tensor([1.0, 2.0, 2.0]), 0.0, 1.0, torch.Generator()) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prompt_ids": [50]}, "token id 50, .* 0 to 49"),
        ({"prompt_ids": [-1]}, "token id -1"),
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
    ],
)
def test_arguments_are_checked(options, reason):
    with pytest.raises(ConfigError, match=reason):
        generate(tiny_model("x070"), **{"prompt_ids": [1], "n_tokens": 1, **options})


def test_logits_that_are_not_finite():
    model = tiny_model("x070")
    with torch.no_grad():
        model.head.weight[4] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        generate(model, [1], 3)
