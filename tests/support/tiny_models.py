"""Small models whose every tensor takes part: initial weights plus noise, so that no matrix is zero."""

import torch

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.model.init import initialize
from rwkv_cluster.model.rwkv import RWKV

VERSIONS = ("x052", "x060", "x070")


def tiny_model_config(model_type, **changes):
    fields = {"n_layer": 2, "n_embd": 32, "vocab_size": 50, "head_size_a": 16}
    return ModelConfig(model_type=model_type, **{**fields, **changes})


def tiny_model(model_type, *, noise=0.1, **changes):
    model = RWKV(tiny_model_config(model_type, **changes))
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return model


def some_tokens(batch, time, vocab_size=50, seed=3):
    return torch.randint(0, vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


def relative_error(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
