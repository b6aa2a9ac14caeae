"""Documents packed into rows: loss and every gradient beside each document alone, in every version."""

from __future__ import annotations

import pytest
import torch
from packed_rows import DOCUMENTS, differentiated, errors, packed
from tiny_models import VERSIONS, relative_error, some_tokens, tiny_model, tiny_model_config
from torch import Tensor
from torch.nn.functional import cross_entropy

from rwkv_cluster.model.rwkv import RWKV


def alone(model: RWKV, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Loss and gradients by parameter, the model called once for each document."""
    losses = [
        cross_entropy(model(x.unsqueeze(0))[0], y, reduction="sum")
        for row, lengths in enumerate(DOCUMENTS)
        for x, y in zip(tokens[row].split(lengths), targets[row].split(lengths), strict=True)
    ]
    return differentiated(model, torch.stack(losses).sum())


def model_with(model_type: str, **choices: str | bool) -> RWKV:
    """`tiny_model` with a backend, a form of the passes, or activation checkpointing."""
    model = RWKV(tiny_model_config(model_type), **choices)
    model.load_state_dict(tiny_model(model_type, noise=0.02).state_dict())
    return model


@pytest.mark.parametrize(
    ("backend", "fused", "grad_cp"),
    [
        ("chunked", "plain", False),
        ("native", "plain", False),
        ("native", "native", False),
        ("native", "native", True),
        pytest.param("reference", "plain", False, marks=pytest.mark.system),
        pytest.param("reference", "native", True, marks=pytest.mark.system),
        pytest.param("chunked", "native", True, marks=pytest.mark.system),
        pytest.param("native", "compile", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("model_type", VERSIONS)
def test_loss_and_every_gradient_are_those_of_each_document_alone(model_type, backend, fused, grad_cp):
    tokens, targets = some_tokens(2, 40), some_tokens(2, 40, seed=7)
    choices = {"wkv_backend": backend, "fused": fused}
    wanted = alone(model_with(model_type, **choices), tokens, targets)
    off = errors(packed(model_with(model_type, grad_cp=grad_cp, **choices), tokens, targets), wanted)
    assert max(off.values()) < 1e-6, off


@pytest.mark.parametrize("backend", ["reference", pytest.param("chunked", marks=pytest.mark.system)])
@pytest.mark.parametrize("model_type", VERSIONS)
def test_in_float64_nothing_at_all_crosses_over(model_type, backend):
    tokens, targets = some_tokens(2, 40), some_tokens(2, 40, seed=7)
    wanted = alone(model_with(model_type, wkv_backend=backend).double(), tokens, targets)
    off = errors(packed(model_with(model_type, wkv_backend=backend).double(), tokens, targets), wanted)
    assert max(off.values()) < 1e-12, off


@pytest.mark.parametrize("model_type", VERSIONS)
def test_a_document_at_the_first_token_does_not_see_the_state(model_type):
    model, tokens = tiny_model(model_type), some_tokens(1, 12)
    _, state = model.forward_with_state(some_tokens(1, 5, seed=9))
    starts = torch.zeros(1, 12, dtype=torch.bool)
    starts[0, 0] = True
    fresh, carried = model.hidden(tokens, starts), model._run(tokens, state)[0]
    reset, _ = model._run(tokens, state, starts)
    assert relative_error(reset, fresh) < 1e-6
    assert relative_error(carried, fresh) > 1e-3
