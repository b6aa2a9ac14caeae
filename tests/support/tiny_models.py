"""Small models whose every tensor takes part: initial weights plus noise, so that no matrix is zero."""

import torch

from rwkv_cluster.adapters.layers import adapter_names, attach, initialize_adapter
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


def add_trained_adapter(model, adapter):
    """An adapter in `model`, away from its initial values as training leaves it."""
    attach(model, adapter)
    initialize_adapter(model, seed=0)
    names, generator = adapter_names(model), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names and parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def adapter_parts(model):
    """The adapter's tensors by name."""
    names = adapter_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def some_tokens(batch, time, vocab_size=50, seed=3):
    return torch.randint(0, vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


def relative_error(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
