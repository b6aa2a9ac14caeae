"""Floating-point operations for one token: the estimate 6 N, and the count of what a training computes.

A multiply-add counts as two. Counted are matrix products and WKV, as in PaLM's appendix B; norms, token shift,
activations and other passes over single elements are not: of C operations each where a product has C^2. Torch-free.

C width, A attention width, F channel-mix width, N head size, H heads (A = H N), V vocabulary; ranks M, Dw, Da, Dv, Dg.
"""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.model.parameter_shapes import count, parameter_shapes
from rwkv_cluster.model.shapes import ModelDims

WKV_PER_STATE_ELEMENT = {"x052": 5, "x060": 5, "x070": 9}
"""Operations of the recurrence for each of the N^2 elements of a head's state (kernels/reference.py).

x052, x060: read 2, decay 1, write 2. x070: read 2, decay 1, S a 2, (S a) b^T 2, write 2. A chunked kernel does more.
"""


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
        """`training`, and with grad_cp the forward pass of the blocks once more. What HFU is computed from.

        The backward pass of WKV recomputes states within 16 steps; that is the kernel's own and not counted.
        """
        return self.training + (self.blocks + self.wkv if grad_cp else 0)


def flops_per_token(model: ModelConfig, *, vocab_size: int | None = None) -> FlopsPerToken:
    """Of `model`. vocab_size: where model.vocab_size is not set. Raises ConfigError where neither is."""
    V = vocab_size or model.vocab_size
    if V is None:
        raise ConfigError("model.vocab_size is not set. Set it to the tokenizer's vocabulary size")
    widths = ModelDims.of(model)
    n_emb = V * widths.embd
    wkv = WKV_PER_STATE_ELEMENT[model.model_type] * widths.n_head * widths.head_size**2
    return FlopsPerToken(
        parameters=count(parameter_shapes(model, V)) - n_emb,
        blocks=2 * sum(_multiplied(model.model_type, widths, layer) for layer in range(model.n_layer)),
        wkv=model.n_layer * wkv,
        head=2 * V * widths.embd,
    )


def _multiplied(model_type: str, widths: ModelDims, layer: int) -> int:
    """Elements of the matrices that a block multiplies a token with."""
    C, A, F = widths.embd, widths.att, widths.ffn
    if model_type == "x070":
        ranks = widths.decay_rank + widths.a_rank + widths.gate_rank
        ranks += widths.v_rank if layer > 0 else 0  # block 0 defines v_first
        return 4 * C * C + 2 * C * ranks + 2 * C * F
    dense = 5 * C * A + 2 * C * F + C * C
    if model_type == "x052":
        return dense
    return dense + 10 * C * widths.mix_rank + (C + A) * widths.decay_rank
