"""The end of a session of training: what it held is given back where it lies."""

from __future__ import annotations

import gc

import torch
from pytorch_lightning.strategies import Strategy


def tear_down(strategy: Strategy) -> None:
    """Drop gradients, moments, and DDP's or DeepSpeed's wrapper, in place of `Strategy.teardown`.

    Lightning's moves weights and moments into the host's pageable memory, 18 GB for 1.5B parameters, and nobody reads
    them there. The weights stay as and where they are, as long as somebody holds the model.
    """
    module = strategy.lightning_module
    if module is not None:
        module.zero_grad(set_to_none=True)
        strategy.model = module
        for callback in getattr(module._trainer, "callbacks", ()):
            for name in ("log", "log_dict"):  # the module's, by which one that outlives the session would hold it
                vars(callback).pop(name, None)
    for optimizer in strategy.optimizers:
        optimizer.state.clear()
    strategy.precision_plugin.teardown()
    assert strategy.accelerator is not None
    strategy.accelerator.teardown()
    strategy.checkpoint_io.teardown()


def free_memory() -> None:
    """Free model, optimizer and Trainer of a session that is over, which are in reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
