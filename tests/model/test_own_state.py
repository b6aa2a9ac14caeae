"""A model that begins from a state of its own: loss and every gradient beside each document alone, in every version."""

from __future__ import annotations

import pytest
import torch
from packed_rows import DOCUMENTS, differentiated, errors, packed
from tiny_models import VERSIONS, relative_error, some_tokens, tiny_model, tiny_model_config
from torch import Tensor
from torch.nn.functional import cross_entropy

from rwkv_cluster.model.generate import generate
from rwkv_cluster.model.own_state import add_own_state, file_shapes, named_state, own_state, set_own_state
from rwkv_cluster.model.rwkv import RWKV


def model_with(model_type: str, *, with_shifts: bool = True, **choices: str | bool) -> RWKV:
    """`tiny_model` with a random state of its own."""
    model = RWKV(tiny_model_config(model_type), **choices)
    model.load_state_dict(tiny_model(model_type, noise=0.02).state_dict())
    generator = torch.Generator().manual_seed(6)
    shapes = file_shapes(model, with_shifts=with_shifts)
    set_own_state(model, {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    return model


def alone(model: RWKV, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Loss and gradients by parameter, each document by a call from the state that is given it."""
    losses = []
    for row, lengths in enumerate(DOCUMENTS):
        for x, y in zip(tokens[row].split(lengths), targets[row].split(lengths), strict=True):
            logits, _ = model.forward_with_state(x.unsqueeze(0), model.initial_state(1))
            losses.append(cross_entropy(logits[0], y, reduction="sum"))
    return differentiated(model, torch.stack(losses).sum())


@pytest.mark.parametrize(
    ("backend", "fused", "grad_cp", "with_shifts"),
    [
        ("native", "native", True, False),
        ("native", "native", False, True),
        ("chunked", "plain", False, True),
        pytest.param("reference", "plain", False, False, marks=pytest.mark.system),
    ],
)
@pytest.mark.parametrize("model_type", VERSIONS)
def test_loss_and_every_gradient_are_those_of_each_document_alone(model_type, backend, fused, grad_cp, with_shifts):
    tokens, targets = some_tokens(2, 40), some_tokens(2, 40, seed=5)
    choices = {"wkv_backend": backend, "fused": fused, "with_shifts": with_shifts}
    wanted = alone(model_with(model_type, **choices), tokens, targets)
    found = packed(model_with(model_type, grad_cp=grad_cp, **choices), tokens, targets)
    assert len([name for name in found if ".own_state." in name]) == (6 if with_shifts else 2)
    assert max(errors(found, wanted).values()) < 1e-6


@pytest.mark.parametrize("model_type", VERSIONS)
def test_in_float64_to_the_last_digits(model_type):
    tokens, targets = some_tokens(2, 40), some_tokens(2, 40, seed=5)
    wanted = alone(model_with(model_type, wkv_backend="reference").double(), tokens, targets)
    found = packed(model_with(model_type, wkv_backend="reference").double(), tokens, targets)
    assert max(errors(found, wanted).values()) < 1e-12


@pytest.mark.parametrize("model_type", VERSIONS)
def test_a_state_of_zeros_changes_nothing(model_type):
    model, tokens = tiny_model(model_type), some_tokens(2, 12)
    names = list(model.state_dict())
    plain = model(tokens)
    add_own_state(model)
    assert relative_error(model(tokens), plain) < 1e-6
    assert set(model.state_dict()) - set(names) == {f"blocks.{layer}.own_state.wkv" for layer in (0, 1)}
    shapes = {name: tuple(tensor.shape) for name, tensor in own_state(model).items()}
    assert shapes == file_shapes(model, with_shifts=False)


@pytest.mark.parametrize("model_type", VERSIONS)
def test_the_state_after_a_prompt_stands_for_the_prompt(model_type):
    prompt, text = some_tokens(1, 9), some_tokens(1, 12, seed=8)
    model = tiny_model(model_type)
    with torch.no_grad():
        wanted = model(torch.cat([prompt, text], dim=1))[:, 9:]
        _, state = model.forward_with_state(prompt)
        set_own_state(model, named_state(model, state))
        assert relative_error(model(text), wanted) < 1e-5
        assert relative_error(model.head(model.hidden(text, torch.zeros(1, 12, dtype=torch.bool))), wanted) < 1e-5
    continuation = generate(model, text[0].tolist(), 8, temperature=0, stop_token=None)
    plain = tiny_model(model_type)
    whole = generate(plain, [*prompt[0].tolist(), *text[0].tolist()], 8, temperature=0, stop_token=None)
    assert continuation == whole
