"""Sizes that the kernels fix, and that a plan of a run counts with. Torch-free, so that a plan needs no torch either.

csrc/wkv.h and csrc/fused.h say the same to the compiled libraries, and tests hold the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

STEPS_BETWEEN_STATES = 16
"""The compiled WKV keeps the state of every 16th step for the backward pass."""

CPU_LARGEST_HEAD_SIZE = 128
CUDA_HEAD_SIZES = (32, 64, 128)
TENSOR_CORE_HEAD_SIZE = 64

FUSED_MULTIPLE = 16
"""What width and head size must be multiples of for the fused passes of the compiled libraries."""

FUSED_CUDA_HEAD_SIZES = (16, 32, 64, 128, 256)
"""Head sizes of the fused passes of the CUDA library, where a warp has whole heads."""

NORM_MIX_COUNTS = (1, 2, 4, 6)
"""Mixes that the compiled libraries' pass of residual sum, layer norm, token shift and mixes may have."""

WIDEST_NORM_MIX = 2560
"""Channels that this pass of the CUDA library may have."""

CHUNK = 16
"""Tokens of a chunk of the WKV in chunked matrix form."""

SEGMENT_BYTES = 1 << 18
"""Target size of one tensor of a segment of the chunked form. About twenty live at a time; best of 2^17 to 2^22."""

LOGITS_IN_FLIGHT = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Elements of logits that the loss has at a time.

64 MiB of fp32 on a CPU. 512 MiB of bf16 on a GPU, where each chunk passes over the head's gradient once.
"""


@dataclass(frozen=True)
class Operator:
    """Costs of the maths of a WKV operator.

    flops_per_state_element: operations of the recurrence for each of the N^2 elements of a head's state
        (kernels/reference.py). A chunked kernel does more.
    inputs: tensors [B,T,H,N] that it reads.
    saves_each_token: the compiled kernel with fp32 maths keeps a vector of N a head and token, S a, beside the states.
    """

    flops_per_state_element: int
    inputs: int
    saves_each_token: bool = False


OPERATORS = {
    "wkv5": Operator(flops_per_state_element=5, inputs=3),  # read 2, decay 1, write 2
    "wkv6": Operator(flops_per_state_element=5, inputs=4),
    # read 2, decay 1, S a 2, (S a) b^T 2, write 2
    "wkv7": Operator(flops_per_state_element=9, inputs=6, saves_each_token=True),
}
"""The WKV operators by the name that they have in every backend."""


def has_fused_passes(device_type: str, width: int, size: int | None = None) -> bool:
    """Whether the compiled library for "cpu" or "cuda" has fused passes of this width, and of head size `size`."""
    if device_type not in ("cpu", "cuda") or width % FUSED_MULTIPLE:
        return False
    if size is None:
        return True
    return size in FUSED_CUDA_HEAD_SIZES if device_type == "cuda" else size % FUSED_MULTIPLE == 0


def has_norm_mix(device_type: str, width: int, count: int) -> bool:
    """Whether the compiled library for "cpu" or "cuda" has the pass of norm and mixes, `count` of them."""
    is_wide = device_type == "cuda" and width > WIDEST_NORM_MIX
    return has_fused_passes(device_type, width) and count in NORM_MIX_COUNTS and not is_wide
