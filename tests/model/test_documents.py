"""Documents packed into rows: loss and every gradient beside each document alone, in every version."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VERSIONS, some_tokens, tiny_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from rwkv_cluster.model.rwkv import RWKV

DOCUMENTS = [[7, 1, 16, 1, 15], [3, 3, 34]]  # lengths, of two rows of 40


def packed(model: RWKV, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Loss and gradients by parameter, each row in one piece."""
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, lengths in enumerate(DOCUMENTS):
        starts[row, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    logits = model.head(model.hidden(tokens, starts))
    return differentiated(model, cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))


def alone(model: RWKV, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Loss and gradients by parameter, the model called once for each document."""
    losses = [
        cross_entropy(model(x.unsqueeze(0))[0], y, reduction="sum")
        for row, lengths in enumerate(DOCUMENTS)
        for x, y in zip(tokens[row].split(lengths), targets[row].split(lengths), strict=True)
    ]
    return differentiated(model, torch.stack(losses).sum())


def differentiated(model: RWKV, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {name: float((found[name] - x).norm() / x.norm()) for name, x in wanted.items()}


@pytest.mark.parametrize("grad_cp", [False, True], ids=["kept", "grad_cp"])
@pytest.mark.parametrize("model_type", VERSIONS)
def test_loss_and_every_gradient_are_those_of_each_document_alone(model_type, grad_cp):
    tokens, targets = some_tokens(2, 40), some_tokens(2, 40, seed=5)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        model = tiny_model(model_type, noise=0.02).to(dtype)
        wanted = alone(model, tokens, targets)
        model = tiny_model(model_type, noise=0.02).to(dtype)
        model.grad_cp = grad_cp
        off = errors(packed(model, tokens, targets), wanted)
        assert max(off.values()) < limit, off
