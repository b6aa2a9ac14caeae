"""How noisy the gradients are, and how far an update moves the weights: optional numbers of every so many steps.

The gradient G of a step of B samples is the mean of the gradients g of its micro batches, of b samples each, on all
ranks:

    grad_signal = (B |G|^2 - b mean |g|^2) / (B - b)      estimates |G|^2 of all data, without noise
    grad_noise  = (mean |g|^2 - |G|^2) / (1 / b - 1 / B)  estimates the trace of the covariance of one sample's gradient

McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, arXiv 1812.06162, appendix A.1. Both are unbiased
and scatter widely, so that the first may be below zero; the mean of many grad_noise over that of as many grad_signal is
the noise scale, in samples.

Nothing is kept from one step to the next, and nothing that trains is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from rwkv_cluster.train.distributed import collectives

Masters = Callable[[], Iterable[tuple[str, Tensor]]]

PARTS = {"emb": "emb", "blocks": "blocks", "ln_out": "head", "head": "head"}
"""Part of the model that a parameter's update counts for, by the beginning of its name."""

_NAMES = ("emb", "blocks", "head")


class UpdateStatistics:
    """Watches the gradients and updates of `model`'s trained parameters in every `interval`-th step.

    masters: see `ModelAndOptimizerState.masters`; in such a step's update there is a copy of them. batch, micro_bsz:
    samples of a step and of a micro batch.
    """

    def __init__(self, model: nn.Module, masters: Masters, interval: int, *, batch: int, micro_bsz: int) -> None:
        self._masters, self._interval, self._batch, self._micro_bsz = masters, interval, batch, micro_bsz
        self._is_due = False
        self._squares = torch.zeros((), dtype=torch.float64)  # sum of |g|^2 of this rank's micro batches, as scaled
        self._before: dict[str, Tensor] = {}
        self._factor = 1.0  # of a micro batch's gradient, by which it is g
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._add_square)  # called before gradients are added up or exchanged

    def begin(self, step: int) -> None:
        """A micro batch of a step, counted from 0, begins."""
        self._is_due = (step + 1) % self._interval == 0

    def _add_square(self, gradient: Tensor) -> None:
        if self._is_due:
            square = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32).double().square()
            self._squares = self._squares.to(square.device) + square

    def before_update(self, loss_scale: float) -> None:
        """All gradients of the step are there. loss_scale: of fp16, else 1."""
        if self._is_due:
            _, ranks = collectives.position()
            self._factor = self._batch / (self._micro_bsz * ranks * loss_scale)  # each loss is divided by their number
            self._before = {name: master.detach().clone() for name, master in self._masters()}

    def after_update(self, grad_norm: float) -> dict[str, float]:
        """Numbers of the step by field of the metrics; none where it is not due, or there was no update. Collective.

        grad_norm: of the whole gradient, before clipping.
        """
        if not self._is_due:
            return {}
        sums = self._moved()
        sums[-1] = self._squares.to(sums.device)
        self._squares, self._before = torch.zeros_like(self._squares), {}
        if not math.isfinite(grad_norm):
            return {}
        *ratios, squares = collectives.sum_over_ranks(sums).tolist()
        moved, weights = ratios[: len(_NAMES)], ratios[len(_NAMES) :]
        numbers = {
            f"update_ratio_{name}": math.sqrt(change / weight)
            for name, change, weight in zip(_NAMES, moved, weights, strict=True)
            if weight > 0
        }
        return numbers | self._noise(squares * self._factor**2, grad_norm**2)

    def _moved(self) -> Tensor:
        """[7] sums of squares of this rank's elements: changes of each part, values of each part before, and a zero.

        Ranks that all have everything count it as often as there are ranks, in both.
        """
        sums = torch.zeros(2 * len(_NAMES) + 1, dtype=torch.float64, device=self._squares.device)
        for name, master in self._masters():
            before, part = self._before[name], _NAMES.index(PARTS[name.partition(".")[0]])
            sums[len(_NAMES) + part] += torch.linalg.vector_norm(before).double().square()
            sums[part] += torch.linalg.vector_norm(before.sub_(master.detach())).double().square()
        return sums

    def _noise(self, squares: float, whole: float) -> dict[str, float]:
        """squares: sum of |g|^2 over all micro batches. whole: |G|^2."""
        batch, micro_bsz = self._batch, self._micro_bsz
        if batch == micro_bsz:
            return {}
        small = squares * micro_bsz / batch
        return {
            "grad_signal": (batch * whole - micro_bsz * small) / (batch - micro_bsz),
            "grad_noise": (small - whole) / (1 / micro_bsz - 1 / batch),
        }
