"""A state of its own that a model begins every document from, in place of zeros: what state tuning trains.

Files of states have `blocks.<layer>.att.time_state` [H,N,N], indexed [value, key] whatever WKV's own order is, and on
request the token shifts, `att.shift_state` and `ffn.shift_state` [C]. In the model they are a module of each block:
ZeRO-3 gathers parameters where their module is called, and a generation needs these outside of the time mix.

C width, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from rwkv_cluster.config import ModelType
from rwkv_cluster.model.parameter_shapes import model_dims
from rwkv_cluster.model.rwkv import RWKV, Block, State
from rwkv_cluster.model.versions.table import VERSIONS

WKV_NAME, ATT_SHIFT_NAME, FFN_SHIFT_NAME = "att.time_state", "att.shift_state", "ffn.shift_state"
"""Names below `blocks.<layer>.` in a file."""

_FILE_NAMES = {"wkv": WKV_NAME, "att_shift": ATT_SHIFT_NAME, "ffn_shift": FFN_SHIFT_NAME}  # by the module's parts


class OwnState(nn.Module):
    """What a block begins from: wkv [H,N,N] as its operator has it, and the shifts [C] or None for zeros.

    Zeros in fp32 (float64 for float64) on the device of `like`.
    """

    att_shift: nn.Parameter | None
    ffn_shift: nn.Parameter | None

    def __init__(self, n_head: int, head_size: int, width: int, *, with_shifts: bool, like: Tensor) -> None:
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.wkv = nn.Parameter(like.new_zeros(n_head, head_size, head_size, dtype=dtype))
        for name in ("att_shift", "ffn_shift"):
            self.register_parameter(name, nn.Parameter(like.new_zeros(width, dtype=dtype)) if with_shifts else None)

    def forward(self, n_rows: int) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The parts of a BlockState of `n_rows`, which share the parameters."""
        # ZeRO holds parameters in the training precision, and the operators' states are fp32
        wkv = self.wkv.to(torch.promote_types(self.wkv.dtype, torch.float32))
        att_shift, ffn_shift = (
            None if shift is None else shift.expand(n_rows, -1) for shift in (self.att_shift, self.ffn_shift)
        )
        return att_shift, wkv.expand(n_rows, -1, -1, -1), ffn_shift


def add_own_state(model: RWKV, *, with_shifts: bool = False) -> None:
    """Give `model` a state of its own, zeros, before it is wrapped. with_shifts: also of the token shifts."""
    widths = model_dims(model.config)
    sizes = (widths.n_head, widths.head_size, widths.embd)
    for block in _blocks(model):
        block.own_state = OwnState(*sizes, with_shifts=with_shifts, like=model.emb.weight)


def file_shapes(model: RWKV, *, with_shifts: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a file of a state of `model`, by name."""
    widths = model_dims(model.config)
    of_block: dict[str, tuple[int, ...]] = {WKV_NAME: (widths.n_head, widths.head_size, widths.head_size)}
    if with_shifts:
        of_block |= {ATT_SHIFT_NAME: (widths.embd,), FFN_SHIFT_NAME: (widths.embd,)}
    return {
        f"blocks.{layer}.{name}": shape for layer in range(model.config.n_layer) for name, shape in of_block.items()
    }


def set_own_state(model: RWKV, tensors: Mapping[str, Tensor]) -> None:
    """Let `model` begin from a state as files have it, with the names and shapes of `file_shapes`."""
    add_own_state(model, with_shifts=f"blocks.0.{ATT_SHIFT_NAME}" in tensors)
    with torch.no_grad():
        for layer, block in enumerate(_blocks(model)):
            own = block.own_state
            assert isinstance(own, OwnState)
            own.wkv.copy_(_turned(tensors[f"blocks.{layer}.{WKV_NAME}"], model.config.model_type))
            for shift, name in ((own.att_shift, ATT_SHIFT_NAME), (own.ffn_shift, FFN_SHIFT_NAME)):
                if shift is not None:
                    shift.copy_(tensors[f"blocks.{layer}.{name}"])


def own_state(model: RWKV) -> dict[str, Tensor]:
    """The model's own state as files have it."""
    return as_file(dict(model.named_parameters()), model.config.model_type)


def as_file(parameters: Mapping[str, Tensor], model_type: ModelType) -> dict[str, Tensor]:
    """The own state among the parameters of a model of that version, as files have it."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        block, separator, part = name.partition(".own_state.")
        if separator:
            tensor = parameter.detach()
            tensors[f"{block}.{_FILE_NAMES[part]}"] = _turned(tensor, model_type) if part == "wkv" else tensor
    return tensors


def named_state(model: RWKV, state: State) -> dict[str, Tensor]:
    """A state of one row as files have it, with the token shifts."""
    parts = {
        f"blocks.{layer}.own_state.{part}": tensor[0]
        for layer, block in enumerate(state)
        for part, tensor in block._asdict().items()
    }
    return as_file(parts, model.config.model_type)


def _turned(wkv: Tensor, model_type: ModelType) -> Tensor:
    """[H,N,N] from the operator's order of axes to the file's, or back."""
    return wkv.mT if VERSIONS[model_type].state_is_key_value else wkv


def _blocks(model: RWKV) -> Iterator[Block]:
    for block in model.blocks:
        assert isinstance(block, Block)
        yield block
