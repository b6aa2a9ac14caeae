"""Feed-forward that RWKV-5 and RWKV-6 share. B batch, T time, C width."""

from __future__ import annotations

from torch import Tensor, nn

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.kernels.documents import Starts
from rwkv_cluster.kernels.fused import ops as fused
from rwkv_cluster.model.layers import Linear, NormMix, complements, uninitialized
from rwkv_cluster.model.parameter_shapes import model_dims


class GatedChannelMix(nn.Module):
    """Feed-forward of RWKV-5 and RWKV-6: relu(k)² under a sigmoid receptance.

    mix: its vectors [1,1,C] are `<mix>_k` and `<mix>_r`. mixes_current: they are the current token's share, as in
    RWKV-5, and not the previous one's.
    """

    def __init__(self, config: ModelConfig, layer: int, fused_choice: str, *, mix: str, mixes_current: bool) -> None:
        super().__init__()
        self.fused, self.mix_names, self.mixes_current = fused_choice, (f"{mix}_k", f"{mix}_r"), mixes_current
        widths = model_dims(config)
        for name in self.mix_names:
            self.register_parameter(name, uninitialized(1, 1, widths.embd))
        self.key = Linear(widths.embd, widths.ffn)
        self.receptance = Linear(widths.embd, widths.embd)
        self.value = Linear(widths.ffn, widths.embd)

    def forward(
        self, x: Tensor, branch: Tensor, norm: NormMix, before: Tensor | None, starts: Starts | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x + branch [B,T,C], what is to be added to it, and the state's part, see `NormMix`."""
        mixes: list[Tensor] = [self.get_parameter(name) for name in self.mix_names]
        if self.mixes_current:
            mixes = complements(mixes, x.dtype)
        x, (x_k, x_r), last = norm(x, branch, mixes, before, starts)
        value = self.value(fused.squared_relu(self.key(x_k), choice=self.fused))
        return x, fused.sigmoid_gate(self.receptance(x_r), value, choice=self.fused), last
