"""Exponential moving average of the masters, kept as one tensor more of the optimizer's state for each parameter.

So it is sharded, offloaded, saved and restored with the moments, under every strategy. It is no part of the optimizer's
formula: training goes the same way with and without it.
"""

from __future__ import annotations

from typing import Any

import torch

from rwkv_cluster.train.optimizers.table import EMA


def keep_ema(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Follow every update with ema = decay * ema + (1 - decay) * master; after a parameter's first it is the master.

    An update that fp16's loss scaling skips is none.
    """

    def follow(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:  # DeepSpeed hands over one of them, or a part of one, at a time
            updated = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in updated:
                if EMA not in optimizer.state[parameter]:
                    optimizer.state[parameter][EMA] = parameter.detach().clone()
            averages = [optimizer.state[parameter][EMA] for parameter in updated]
            if averages:
                torch._foreach_lerp_(averages, [parameter.detach() for parameter in updated], 1 - decay)

    optimizer.register_step_post_hook(follow)
