"""Bytes that a forward pass keeps for the backward pass, counted from the blocks' own code.

The counts below are of tensors that autograd saves, each storage once; `tests/train/memory/test_activations.py`
compares them with what it really saves. Statistics of norms and single vectors are left out: below 1 % at head size 64.

B batch, T time, C width, A attention width, F channel-mix width, N head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

from rwkv_cluster.config import ModelConfig, TrainingConfig
from rwkv_cluster.kernels.sizes import (
    CHUNK,
    CPU_LARGEST_HEAD_SIZE,
    CUDA_HEAD_SIZES,
    LOGITS_IN_FLIGHT,
    OPERATORS,
    SEGMENT_BYTES,
    STEPS_BETWEEN_STATES,
    TENSOR_CORE_HEAD_SIZE,
    has_fused_passes,
    has_norm_mix,
)
from rwkv_cluster.model.parameter_shapes import block_parameters, count, lora_hidden, model_dims
from rwkv_cluster.model.versions.table import version_of
from rwkv_cluster.train.memory.model_states import FP32, ITEM_BYTES
from rwkv_cluster.train.optimizers.selection import RunParameters

_OUTSIDE = 3
"""[B,T,C] tensors outside the blocks: the inputs of ln0 and ln_out, and the head's gradient by its input."""
_SHIFTED = 2
"""[B,T,C] tensors that a block's token shifts keep where norm and mixes are not one pass, which computes them again."""
_WORKSPACE = 2
"""[B,T,F] tensors that a block's backward pass has at a time beside the saved ones. Measured on a CPU in fp32."""
_WORKSPACE_CHUNKED = 16
"""fp32 tensors of a segment that the chunked WKV has at a time in its backward pass. Measured on a CPU."""


@dataclass(frozen=True)
class Kernels:
    """Forms that compute a block, and the loss.

    wkv: "tensor_cores", "native", "chunked", "reference". fused: "plain" or another. has_loss: whether the library's
    loss is there, on a GPU; a CPU has none. sums_products: whether torch adds bf16 and fp16 products to an fp32 sum in
    place, on a GPU; a CPU makes each product first.
    """

    device: str
    wkv: str
    fused: str
    has_loss: bool = True
    sums_products: bool = True

    @classmethod
    def of(cls, training: TrainingConfig, model: ModelConfig, device: str) -> Kernels:
        """Forms that "auto" takes on "cpu" or "cuda" with compiled libraries and Triton at hand. fla is as auto."""
        head_size, on_gpu = model.head_size_a, device == "cuda"
        wkv: str = training.wkv_backend
        if wkv in ("auto", "fla", "native"):
            has_library = head_size in CUDA_HEAD_SIZES if on_gpu else head_size <= CPU_LARGEST_HEAD_SIZE
            has_tensor_cores = on_gpu and training.precision == "bf16" and head_size == TENSOR_CORE_HEAD_SIZE
            wkv = "chunked" if not has_library else "tensor_cores" if has_tensor_cores else "native"
        fused: str = training.fused
        if fused == "auto":
            serves = has_fused_passes(device, model.n_embd, head_size)
            fused = "native" if serves else "compile" if on_gpu else "plain"
        return cls(device, {"exact": "native"}.get(wkv, wkv), fused, sums_products=_torch_sums_products())

    @property
    def is_compiled(self) -> bool:
        """Whether WKV is a kernel of the compiled library."""
        return self.wkv in ("native", "tensor_cores")


@cache
def _torch_sums_products() -> bool:
    """Whether the installed torch, which is not imported, is 2.10 or newer, as `model.loss` needs it."""
    return tuple(int(number) for number in version("torch").split(".")[:2]) >= (2, 10)


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro batch of one rank.

    block, wkv, weights: saved by all blocks, for which grad_cp keeps `inputs` and one block of the three: tensors of
    the block, states of WKV, and parameters in the training precision where they are kept in fp32.
    first_less: what block 0 saves less where its input is frozen. outside: saved beside the blocks. workspace: of one
    block's backward pass. head, head_backward: of loss and head while they are computed.
    """

    n_layer: int
    block: float
    wkv: float
    weights: float
    inputs: float
    outside: float
    workspace: float
    head: float
    head_backward: float
    first_less: float = 0.0

    @property
    def one_block(self) -> float:
        """Bytes of one block, of the three parts that grad_cp computes anew."""
        return (self.block + self.wkv + self.weights) / self.n_layer

    def saved(self, *, grad_cp: bool) -> float:
        """Bytes at the end of the forward pass; with grad_cp without the block that the backward pass computes anew."""
        return self.outside + (self.inputs if grad_cp else self.block + self.wkv + self.weights - self.first_less)


def activations(
    model: ModelConfig,
    vocab_size: int,
    kernels: Kernels,
    *,
    micro_bsz: int,
    precision: str,
    bf16_parameters: bool,
    parameters: RunParameters | None = None,
) -> Activations:
    """Activations of a micro batch. bf16_parameters: whether they have the training precision (ZeRO 1 to 3).

    parameters: where the configuration freezes some. Where it trains a part of the model, all that a whole one saves is
    counted, and of a frozen model the inputs that an adapter needs.
    """
    C, L, item = model.n_embd, model.n_layer, ITEM_BYTES[precision]
    tokens = micro_bsz * model.ctx_len
    copies = 0 if bf16_parameters or precision == "fp32" else item
    in_blocks, trains_head, hidden, is_frozen, dequantized = block_parameters(model), True, 0, False, 0
    if parameters is not None:
        is_frozen = parameters.freezes_model
        dequantized = 0 if parameters.quant == "none" else item * C * model_dims(model).ffn
        in_blocks = count({name: shape for name, shape in parameters.trained.items() if name.startswith("blocks.")})
        trains_head, hidden = "head.weight" in parameters.trained, parameters.adapter_hidden
    of_head = vocab_size * C if trains_head else 0  # elements of its weight's gradient
    head = _head_bytes(tokens, vocab_size, item, kernels)
    product = 0 if kernels.device == "cuda" and kernels.sums_products and item < FP32 else item
    return Activations(
        n_layer=L,
        block=tokens * (_block_bytes(model, kernels, item, is_frozen=is_frozen) + hidden * item),
        wkv=L * _wkv_bytes(model, kernels, micro_bsz),
        weights=float(in_blocks * copies),
        inputs=float(tokens * C * item * (L + version_of(model).saved.carried)),
        outside=float(tokens * ((_OUTSIDE - is_frozen) * C * item + 8) + of_head * FP32),
        workspace=dequantized + _workspace(model, kernels, tokens, item) + _chunked(model, kernels, micro_bsz),
        head=head + of_head * (product + copies),
        head_backward=float(of_head * (FP32 + (item if bf16_parameters and item < FP32 else 0))),
        first_less=float(tokens * C * item * version_of(model).saved.of_width_trained_in_block_0 * is_frozen),
    )


def _workspace(model: ModelConfig, kernels: Kernels, tokens: int, item: int) -> float:
    """Bytes that a block's backward pass has at a time beside the saved ones, without WKV's.

    A CPU without units for them computes bf16 products in fp32, see `model.layers`: in the channel mix's largest there
    are its operands and its result, and that once more as it is kept.
    """
    C, F = model.n_embd, model_dims(model).ffn
    if kernels.device == "cpu" and item < FP32:
        return float(FP32 * (tokens * C + C * F + tokens * F) + item * tokens * F)
    return float(_WORKSPACE * tokens * item * F)


def _block_bytes(model: ModelConfig, kernels: Kernels, item: int, *, is_frozen: bool) -> float:
    """Bytes that all blocks save for one token, without WKV's states. is_frozen: the block's parameters are."""
    widths, saved, L = model_dims(model), version_of(model).saved, model.n_layer
    is_plain = kernels.fused == "plain"
    of_attention = saved.of_attention + (saved.of_attention_plain if is_plain else 0)
    elements = L * (saved.of_width * widths.embd + 2 * widths.ffn + of_attention * widths.att)
    elements += lora_hidden(model) - saved.of_width_not_in_block_0 * widths.embd
    is_one_pass = kernels.fused == "native" and has_norm_mix(kernels.device, widths.embd, 1)
    keeps_shifted = not is_one_pass and (kernels.fused == "native" or not is_frozen)
    elements += L * _SHIFTED * keeps_shifted * widths.embd
    more_bytes = 0
    if is_plain and saved.of_width_plain:
        more_bytes = L * widths.embd * ((saved.of_width_plain - 1) * item + FP32)
    if is_frozen:
        of_width = saved.of_width_trained + (saved.of_width_trained_plain if is_plain else 0)
        elements -= L * (of_width * widths.embd + saved.of_attention_trained * widths.att + widths.ffn)
    return float(elements * item + more_bytes)


def _wkv_bytes(model: ModelConfig, kernels: Kernels, micro_bsz: int) -> float:
    """Bytes that one block's WKV saves: states, and a vector of each token where the operator saves one.

    In chunked form the state at the segments' boundaries; by the time loop that of every token.
    """
    A, N, T = model_dims(model).att, model.head_size_a, model.ctx_len
    states = micro_bsz * -(-T // STEPS_BETWEEN_STATES) * A * N
    if kernels.wkv == "tensor_cores":
        return 2.0 * states
    if kernels.wkv == "native":
        each_token = OPERATORS[version_of(model).operator].saves_each_token
        return 4.0 * (states + (micro_bsz * T * A if each_token else 0))
    if kernels.wkv == "reference":
        return 4.0 * micro_bsz * T * A * N
    return 4.0 * micro_bsz * A * N * -(-T // _segment(model, kernels, micro_bsz))


def _segment(model: ModelConfig, kernels: Kernels, micro_bsz: int) -> int:
    """Tokens of a segment of the chunked WKV: what fits into a core's cache; on a GPU the whole sample."""
    if kernels.device != "cpu":
        return model.ctx_len
    return CHUNK * max(1, SEGMENT_BYTES // (4 * micro_bsz * model_dims(model).att * CHUNK))


def _chunked(model: ModelConfig, kernels: Kernels, micro_bsz: int) -> float:
    """The chunked WKV's own workspace."""
    if kernels.wkv != "chunked":
        return 0.0
    tokens = micro_bsz * min(model.ctx_len, _segment(model, kernels, micro_bsz))
    return float(_WORKSPACE_CHUNKED * FP32 * tokens * model_dims(model).att)


def _head_bytes(tokens: int, V: int, item: int, kernels: Kernels) -> float:
    """Bytes of `model.loss.head_loss` at work, where the head is frozen.

    Logits of a chunk of rows, in whose place a GPU's library writes their gradient; without it their softmax in fp32
    and its gradient too, which a CPU's product wants transposed. A trained head has the weight in the training
    precision beside them, and the chunk's product for the weight's gradient where it cannot be added in place.
    """
    rows, on_cpu = min(tokens, max(16, LOGITS_IN_FLIGHT[kernels.device] // V)), kernels.device == "cpu"
    if kernels.has_loss and not on_cpu:
        return float(rows * V * item)
    gradients = (0 if item == FP32 else item) + (item if on_cpu else 0)
    return float(rows * V * (item + FP32 + gradients))
