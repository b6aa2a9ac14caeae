"""Facts that make a model version: the type of a row of `versions.table`. Torch-free.

C width, A attention width, F channel-mix width, H heads, N head size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

from rwkv_cluster.config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of parameters, by name."""


@dataclass(frozen=True)
class ModelDims:
    """Resolved widths and LoRA ranks. A rank that the architecture lacks is 0."""

    embd: int
    att: int
    ffn: int
    n_head: int
    head_size: int
    mix_rank: int = 0
    decay_rank: int = 0
    a_rank: int = 0
    v_rank: int = 0
    gate_rank: int = 0


@dataclass(frozen=True)
class SavedTensors:
    """Number of tensors that autograd saves of one block, without WKV's states, [B,T,F] and the LoRAs' hidden ones.

    Norms, mixes and products save their inputs.

    Attributes:
        of_width: [B,T,C].
        of_attention: [B,T,A], where A is not C by rule.
        of_attention_plain: [B,T,A] more in the plain form.
        of_width_plain: [B,T,C] more in the plain form, the last of them fp32 in any precision.
        of_width_not_in_block_0: [B,T,C] that block 0 does without.
        carried: [B,T,C] that pass from block 0 to all others, such as v_first.
        of_width_trained, of_attention_trained, of_width_trained_plain: those of them, the last beside the first in the
            plain form, that nothing but the gradients of the block's own parameters needs.
        of_width_trained_in_block_0: more of them in block 0, whose input has no gradient where emb is frozen.
    """

    of_width: int
    of_attention: int = 0
    of_attention_plain: int = 0
    of_width_plain: int = 0
    of_width_not_in_block_0: int = 0
    carried: int = 0
    of_width_trained: int = 0
    of_attention_trained: int = 0
    of_width_trained_plain: int = 0
    of_width_trained_in_block_0: int = 0


@dataclass(frozen=True)
class Passes:
    """Work of one block for one token beside its matrix products and WKV, at width 512.

    Weights are not in it. A pass of the compiled library is counted as what it reads and writes, and one operation.

    Attributes:
        forward, training: [T,C] tensors read or written, of the forward pass and of forward and backward.
        launches_forward, launches: operations that the host queues for the block in bf16, products and copies of
            weights included.
    """

    forward: int
    training: int
    launches_forward: int
    launches: int


@dataclass(frozen=True)
class Version:
    """One version of the RWKV architecture: all that the rest of the package asks about it.

    Attributes:
        name: `model.model_type` of a configuration, e.g. "x070".
        title: number of the version as RWKV's users say it, e.g. "7".
        module: dotted name of the file with the blocks TimeMix and ChannelMix and their initial values
            INITIAL_MATRICES and `initial_vectors`. Imported when it is first used, because it needs torch.
        operator: name of its WKV operator in `rwkv_cluster.kernels.sizes.OPERATORS`.
        state_is_key_value: whether that indexes its state [key, value]. Files of states have [value, key] in any case.
        ffn_width: C -> default of F.
        default_ranks: C -> default of each LoRA rank that it has; "decay" of `decay_lora_rank`.
        time_mix: widths -> shapes of the tensors below `att.`, without ln_x.
        channel_mix: widths -> shapes of the tensors below `ffn.`.
        loras: names below `att.` of the two matrices of each LoRA, the one into the rank first.
        unused_in_block_0: names below `att.` that block 0 may have and no computation uses.
        per_head: name below `att.` of a tensor [H,N], which tells the head size of weights.
        recognises: shapes of a weights file -> whether they are this version's.
        ranks_of: shapes of a weights file -> fields of the configuration that say its LoRA ranks.
        optimizer_group: (name, whether it is a matrix) -> (learning-rate multiplier, whether weight decay applies).
        saved: what the backward pass needs.
        passes, passes_native, passes_wide: work beside the products, in the plain form, in the native one, for which
            torch.compile's is taken too, and in that beyond the width to which it has norm and mixes in one pass.
    """

    name: str
    title: str
    module: str
    operator: str
    ffn_width: Callable[[int], int]
    default_ranks: Callable[[int], Mapping[str, int]]
    time_mix: Callable[[ModelDims], Shapes]
    channel_mix: Callable[[ModelDims], Shapes]
    per_head: str
    recognises: Callable[[Shapes], bool]
    ranks_of: Callable[[Shapes], Mapping[str, int | bool | None]]
    optimizer_group: Callable[[str, bool], tuple[float, bool]]
    saved: SavedTensors
    passes: Passes
    passes_native: Passes
    passes_wide: Passes
    state_is_key_value: bool = False
    loras: tuple[tuple[str, str], ...] = ()
    unused_in_block_0: tuple[str, ...] = ()

    def dims(self, config: ModelConfig) -> ModelDims:
        """Widths and ranks of `config`, with this version's defaults where it leaves them open."""
        C, N = config.n_embd, config.head_size_a
        att = config.dim_att or C
        ranks = {
            f"{kind}_rank": getattr(config, f"{kind}_lora_rank") or default
            for kind, default in self.default_ranks(C).items()
        }
        ffn = config.dim_ffn or self.ffn_width(C)
        return ModelDims(embd=C, att=att, ffn=ffn, n_head=att // N, head_size=N, **ranks)

    def blocks(self) -> ModuleType:
        """The module with its blocks and their initial values. Loads torch."""
        return importlib.import_module(self.module)
