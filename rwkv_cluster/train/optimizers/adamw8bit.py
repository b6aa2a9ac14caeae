"""AdamW with its moments in 8 bits, by torchao (extra: torchao), over RWKV-LM's parameter groups.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021, arXiv 2110.02861: each element of a moment is one
of the 256 values of a dynamic map, times the largest of its block of 256 elements. An update is computed in fp32
from the dequantized moments and the gradient. The embedding, whose rows have rare gradients (section 2.3 there), and
small parameters keep fp32 moments and torch's AdamW.

torchao has a tensor class for a moment; here, and in checkpoints, it is two plain tensors: codes and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.config import TrainingConfig
from rwkv_cluster.kernels.fused.ops import missing_for_compile
from rwkv_cluster.train.optimizers import adamw
from rwkv_cluster.train.optimizers.adamw import group_of
from rwkv_cluster.train.optimizers.closure import loss_of
from rwkv_cluster.train.optimizers.table import BLOCK, SCALE

__all__ = ["AdamW8bit", "build", "group_of"]

_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Whether each has a sign."""


def build(groups: list[dict[str, Any]], training: TrainingConfig) -> AdamW8bit:
    """8-bit AdamW over the groups whose moments have scales, AdamW over the others."""
    return AdamW8bit(groups, training)


def _is_in_8_bits(group: dict[str, Any]) -> bool:
    return any(moment.endswith(SCALE) for moment in group["moments"])


def _may_compile(parameters: Sequence[Tensor]) -> bool:
    """Whether torchao compiles its formula, for each shape: on a CPU that takes longer than it saves, and a GPU's
    compiler may be missing.
    """
    return all(parameter.is_cuda for parameter in parameters) and missing_for_compile("cuda") is None


class AdamW8bit(torch.optim.Optimizer):
    """torchao's 8-bit AdamW beside torch's AdamW, which share groups and state."""

    def __init__(self, groups: list[dict[str, Any]], training: TrainingConfig) -> None:
        import torchao.optim

        super().__init__(groups, {"lr": training.lr_init, "fused": training.precision != "fp16"})
        self._adamw = adamw.build(groups, training)
        copies = [{"params": group["params"]} for group in groups]  # torchao makes tensors of their rates
        self._torchao = torchao.optim.AdamW8bit(
            copies,
            lr=training.lr_init,
            betas=(training.beta1, training.beta2),
            eps=training.adam_eps,
            block_size=BLOCK,
        )
        self._tensor_class = torchao.optim.subclass_8bit.OptimState8bit
        self._maps: dict[bool, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = loss_of(closure)
        in_8_bits = [group for group in self.param_groups if _is_in_8_bits(group)]
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not _is_in_8_bits(group)]
        self._adamw.step()
        self._torchao.param_groups = [
            {**self._torchao.defaults, **group, "lr": torch.tensor(group["lr"], dtype=torch.float32)}
            for group in in_8_bits
        ]
        parameters = [parameter for group in in_8_bits for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            self._torchao.state[parameter] = self._as_torchao(self._state_of(parameter))
        with nullcontext() if _may_compile(parameters) else torch.compiler.set_stance("force_eager"):
            self._torchao.step()
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Step, and codes and scales of both moments, which are zero before the first update."""
        state: dict[str, Tensor] = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), device=parameter.device)
            for moment in _MOMENTS:
                state[moment] = torch.zeros_like(parameter, dtype=torch.uint8)
                state[moment + SCALE] = torch.zeros(parameter.numel() // BLOCK, device=parameter.device)
        return state

    def _as_torchao(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same memory as torchao has it."""
        moments = {
            moment: self._tensor_class(
                state[moment], state[moment + SCALE], self._map(signed, state[moment].device), signed, torch.float32
            )
            for moment, signed in _MOMENTS.items()
        }
        return {"step": state["step"], **moments}

    def _map(self, signed: bool, device: torch.device) -> Tensor:
        """The 256 values."""
        if signed not in self._maps:
            self._maps[signed] = self._tensor_class.zeros((BLOCK,), signed, BLOCK, device).qmap
        return self._maps[signed]
