"""Loss and every gradient of a model over rows of several documents."""

import torch
from torch.nn.functional import cross_entropy

DOCUMENTS = [[7, 1, 16, 16], [40]]  # lengths, of two rows of 40


def packed(model, tokens, targets):
    """Loss and gradients by parameter, each row in one piece."""
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, lengths in enumerate(DOCUMENTS):
        starts[row, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    logits = model.head(model.hidden(tokens, starts))
    return differentiated(model, cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))


def differentiated(model, loss):
    """The loss, and gradients by parameter where there are any."""
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def errors(found, wanted):
    """Relative error of each, by name."""
    assert found.keys() == wanted.keys()
    return {name: float((found[name] - x).norm() / x.norm()) for name, x in wanted.items()}
