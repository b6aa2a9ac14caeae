"""The RWKV language model: embedding, blocks, head. Parameter names and shapes are RWKV-LM's.

B batch, T time, C width, V vocabulary, H heads, N head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.kernels.documents import Documents, Starts
from rwkv_cluster.model.layers import Embedding, FinalNorm, LayerNorm, Linear, NormMix
from rwkv_cluster.model.parameter_shapes import model_dims
from rwkv_cluster.model.versions.table import version_of


class BlockState(NamedTuple):
    """State that a block carries from one segment of a sequence to the next."""

    att_shift: Tensor  # [B,C] last input of the time mix
    wkv: Tensor  # [B,H,N,N] fp32; [key, value] in RWKV-5 and 6, [value, key] in RWKV-7
    ffn_shift: Tensor  # [B,C] last input of the channel mix


State = list[BlockState]


class Block(nn.Module):
    """One layer: x + time mix, then x + channel mix, each on its own layer norm."""

    def __init__(self, config: ModelConfig, layer: int, wkv_backend: str, fused_choice: str) -> None:
        super().__init__()
        version = version_of(config).blocks()
        if layer == 0:
            self.ln0 = LayerNorm(config.n_embd)
        self.ln1 = NormMix(config.n_embd, fused_choice)
        self.ln2 = NormMix(config.n_embd, fused_choice)
        self.att = version.TimeMix(config, layer, wkv_backend, fused_choice)
        self.ffn = version.ChannelMix(config, layer, fused_choice)
        self.own_state: nn.Module | None = None  # see rwkv_cluster.model.own_state

    def begin(self, n_rows: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Parts of the BlockState of `n_rows` that the block begins from: its own state; None for zeros."""
        return (None, None, None) if self.own_state is None else self.own_state(n_rows)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        v_first: Tensor | None,
        state: BlockState | None,
        starts: Starts | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, BlockState | None]:
        """Two tensors [B,T,C] whose sum is the output, v_first and state; the input is x + branch [B,T,C] likewise.

        The next norm adds them. v_first [B,T,C] is RWKV-7's, None before block 0; a state is returned if one came.
        starts: bool [B,T], true where a document begins: it sees nothing of what came before, nor of the state. Or
        documents, which begin from the block's own state.
        """
        before, wkv, ffn_before = state or self.begin(len(starts) if isinstance(starts, Documents) else len(x))
        x, branch, v_first, att_last, wkv = self.att(x, branch, self.ln1, v_first, before, wkv, starts)
        x, branch, ffn_last = self.ffn(x, branch, self.ln2, ffn_before, starts)
        if state is None:
            return x, branch, v_first, None
        return x, branch, v_first, BlockState(att_last.clone(), wkv, ffn_last.clone())

    def summed(
        self, x: Tensor, v_first: Tensor | None, state: BlockState | None, starts: Starts | None
    ) -> tuple[Tensor, Tensor | None, BlockState | None]:
        """The output [B,T,C] as one tensor, which is what `grad_cp` keeps of a block; v_first and state."""
        x, branch, v_first, after = self(x, None, v_first, state, starts)
        return x + branch, v_first, after


class RWKV(nn.Module):
    """RWKV-5.2, RWKV-6 or RWKV-7 by `config.model_type`.

    Parameters are NaN until `rwkv_cluster.model.init.initialize` or a checkpoint fills them. Activations have
    the dtype `compute_dtype`, by default that of the parameters.

    Args:
        config: architecture; `vocab_size` must be set.
        grad_cp: recompute each block in the backward pass instead of keeping its activations.
        wkv_backend: which form of the WKV operator, one of `rwkv_cluster.kernels.ops.BACKENDS`.
        fused: which form of token shift, key preparation and reading, one of `rwkv_cluster.kernels.fused.ops.CHOICES`.

    Raises:
        ConfigError: `vocab_size` is not set.
    """

    def __init__(
        self, config: ModelConfig, *, grad_cp: bool = False, wkv_backend: str = "auto", fused: str = "auto"
    ) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size is not set", remedy="Set it to the tokenizer's vocabulary size")
        self.config = config
        self.grad_cp = grad_cp
        self.preserve_rng_state = False  # in the second pass of grad_cp; only dropout draws random numbers
        self.compute_dtype: torch.dtype | None = None
        self.emb = Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer, wkv_backend, fused) for layer in range(config.n_layer))
        self.ln_out = FinalNorm(config.n_embd, fused)
        self.head = Linear(config.n_embd, config.vocab_size)

    def forward(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """Logits [B,T,V] of int tokens [B,T], continuing from `state` if given."""
        return self.head(self._run(tokens, state)[0])

    def hidden(self, tokens: Tensor, starts: Tensor | None = None) -> Tensor:
        """Activations [B,T,C] after ln_out, on which `head_loss` applies the head.

        starts: bool [B,T], true where a document begins: WKV's state and both token shifts begin at zero there, or at
        the model's own state.
        """
        return self._run(tokens, None, Documents(starts) if starts is not None and self.has_own_state else starts)[0]

    def forward_with_state(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits [B,T,V] and the state after the last token, to be passed in with the tokens that follow."""
        hidden, state = self._run(tokens, state or self.initial_state(tokens.shape[0]))
        return self.head(hidden), state

    def forward_last(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits [B,V] after the last token alone, and the state there."""
        hidden, state = self._run(tokens, state)
        return self.head(hidden[:, -1]), state

    @property
    def has_own_state(self) -> bool:
        """Whether it begins from a state of its own, see `rwkv_cluster.model.own_state`, and not from zeros."""
        first = self.blocks[0]
        assert isinstance(first, Block)
        return first.own_state is not None

    def initial_state(self, batch_size: int) -> State:
        """The state before any token: zeros, or the model's own."""
        widths = model_dims(self.config)
        shift = self.emb.weight.new_zeros(batch_size, widths.embd, dtype=self.compute_dtype)
        wkv_dtype = torch.promote_types(shift.dtype, torch.float32)
        wkv = shift.new_zeros(batch_size, widths.n_head, widths.head_size, widths.head_size, dtype=wkv_dtype)
        zeros, state = BlockState(shift, wkv, shift), []
        for block in self.blocks:
            assert isinstance(block, Block)
            own = block.begin(batch_size)
            state.append(
                BlockState(*(z if part is None else part.to(z.dtype) for part, z in zip(own, zeros, strict=True)))
            )
        return state

    def _run(self, tokens: Tensor, state: State | None, starts: Starts | None = None) -> tuple[Tensor, State]:
        x = self.emb(tokens)  # [B,T,C]
        first = self.blocks[0]
        assert isinstance(first, Block)
        x = first.ln0(x if self.compute_dtype is None else x.to(self.compute_dtype))
        branch: Tensor | None = None
        v_first: Tensor | None = None
        after: State = []
        for layer, block in enumerate(self.blocks):
            before = None if state is None else state[layer]
            if self.grad_cp and torch.is_grad_enabled():
                assert isinstance(block, Block)
                x, v_first, block_state = checkpoint(
                    block.summed,
                    x,
                    v_first,
                    before,
                    starts,
                    use_reentrant=False,
                    preserve_rng_state=self.preserve_rng_state,
                )
            else:
                x, branch, v_first, block_state = block(x, branch, v_first, before, starts)
            after.append(block_state)
        return self.ln_out(x, branch), after
