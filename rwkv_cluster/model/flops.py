"""Floating-point operations for one token: the estimate 6 N, and the count of what a training computes.

A multiply-add counts as two. Counted are matrix products and WKV, as in PaLM's appendix B; norms, token shift,
activations and other passes over single elements are not: of C operations each where a product has C^2. Torch-free.

C width, N head size, H heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.kernels.sizes import OPERATORS
from rwkv_cluster.model.parameter_shapes import count, model_dims, multiplied, parameter_shapes
from rwkv_cluster.model.versions.table import version_of


@dataclass(frozen=True)
class FlopsPerToken:
    """Operations for one token of a sample.

    parameters: N of 6 N, all but the embedding table, of which a token only reads a row.
    blocks, wkv, head: of one forward pass; matrix products of all blocks, WKV of all blocks, the head.
    """

    parameters: int
    blocks: int
    wkv: int
    head: int

    @property
    def six_n(self) -> int:
        """2 N forward and 4 N backward: Kaplan et al., "Scaling Laws for Neural Language Models", 2020, section 2.1."""
        return 6 * self.parameters

    @property
    def forward(self) -> int:
        """The count for one forward pass."""
        return self.blocks + self.wkv + self.head

    @property
    def training(self) -> int:
        """The count for forward and backward: each product has two in the backward pass, by input and by weight."""
        return 3 * self.forward

    def hardware(self, *, grad_cp: bool) -> int:
        """Count of `training`, and with grad_cp the forward pass of the blocks once more: the numerator of HFU.

        The backward pass of WKV recomputes states within 16 steps; that is the kernel's own and not counted.
        """
        return self.training + (self.blocks + self.wkv if grad_cp else 0)


def flops_per_token(model: ModelConfig, *, vocab_size: int | None = None) -> FlopsPerToken:
    """FLOPs per token of `model`. Raises ConfigError where neither vocab_size nor model.vocab_size is set."""
    V = vocab_size or model.vocab_size
    if V is None:
        raise ConfigError("model.vocab_size is not set", remedy="Set it to the tokenizer's vocabulary size")
    shapes, widths = parameter_shapes(model, V), model_dims(model)
    operator = OPERATORS[version_of(model).operator]
    return FlopsPerToken(
        parameters=count(shapes) - V * widths.embd,
        blocks=2 * multiplied(shapes),
        wkv=model.n_layer * operator.flops_per_state_element * widths.n_head * widths.head_size**2,
        head=2 * V * widths.embd,
    )
