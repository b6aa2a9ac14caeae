"""Predicted time of a step of one GPU, by part: what is computed and moved, over the rate that a GPU reaches.

A model to hold the first real run against, not a measurement. The work is counted, and the counts are tested: FLOPs by
`model.flops`, tensors and launches of a block by `tests/planning/test_step_time.py`. The rates are assumptions, named
below with where they come from. Communication between ranks is not in it. Torch-free.

T tokens of a micro batch, C width, H heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.kernels.sizes import OPERATORS, STEPS_BETWEEN_STATES, has_norm_mix
from rwkv_cluster.model.parameter_shapes import count, model_dims
from rwkv_cluster.model.versions.table import version_of
from rwkv_cluster.model.versions.version import Passes
from rwkv_cluster.planning.run_plan import RunPlan
from rwkv_cluster.runtime.gpu_specs import Gpu, find_gpu
from rwkv_cluster.train.memory.activations import Kernels
from rwkv_cluster.train.memory.model_states import FP32, ITEM_BYTES, keeps_copies

PARAMETER_BYTES = 36
"""Moved for a parameter in the update: AdamW reads and writes weight and moments and reads the gradient, 28; its norm
reads it once more, 4; and it is set to zero, 4."""
COPY_BYTES = 6
"""Moved for a parameter of blocks and head that is kept in fp32: it is read, and its copy in the training precision
written. In every forward pass, or where the copies are kept, once in a step."""
GRADIENT_BYTES = 6
"""Moved for such a parameter of a block in a micro batch: its gradient is read, and written in fp32."""
LOGIT_PASSES = 3
"""Reads and writes of a logit in the compiled loss: for its row's largest and sum, for its gradient, and of that."""

BANDWIDTH_SHARE = 0.78
"""Of the datasheet's bandwidth that passes over tensors reach: 2.6 TB/s of 3.35 on an H100."""
WKV_BYTES_PER_S = 3350e9 * BANDWIDTH_SHARE / 1.7 / 132
"""Bytes of WKV's tensors that a multiprocessor with two blocks gets through in a second. Shared memory is its limit,
and the GPU's own memory no more than a floor. From a model of the compiled code for an H100, which has 132: 1.7 times
the time of the bytes, and with fp32 maths more."""
WKV7_BYTES_PER_S = 19.3e9
"""The same of RWKV-7's forms that take 32 steps between barriers, by that model: 45,056 bytes of two blocks in 3,918 to
4,200 cycles forward, 69,632 in 5,796 to 6,961 backward, by what an access to shared memory is taken to cost, at
1.755 GHz. For B 8, T 4096, H 64 on an H100 both ways take 2.9 to 3.2 ms, in which memory could be read just once."""
WKV_BLOCKS = 2
"""Blocks on a multiprocessor beyond which there is no gain; with fewer heads than places the time stays."""
WKV_BLOCK_KIB = (33_088 / 1024 + 1, 72_784 / 1024 + 1)
"""Shared memory of a block of the forward and the backward pass on tensor cores that take 16 steps between barriers,
with what CUDA adds; 68,992 bytes in RWKV-6's backward pass make no difference."""
WKV7_BLOCK_KIB = (49_888 / 1024 + 1, 115_264 / 1024 + 1)
"""The same of RWKV-7's that take 32, backward where two of them fit and forward always."""
WKV_ALONE = 0.67
"""Time of one block on a multiprocessor over that of two: where heads are fewer than multiprocessors, or where shared
memory has no room for a second block.

By the same model: 9,160 or 8,830 cycles a chunk forward and backward over 14,030 or 12,530, by what an access to shared
memory is taken to cost, and of RWKV-7's forms with 32 steps 2,539 over 3,918 and 3,870 over 5,796. One block waits for
its own results, two for shared memory.
"""
LAUNCH_SECONDS = 16e-6
"""Of the host for one operation with its backward in Python and PyTorch."""


PARTS = {
    "blocks": "products of the blocks",
    "head": "products of the head",
    "loss": "softmax and its gradient",
    "passes": "norms, token shift, gates",
    "wkv": "WKV",
    "casts": "bf16 copies of weights",
    "update": "AdamW and clipping",
    "host": "the host, beside these",
}
"""Fields of StepTime that are seconds, in words."""


def product_share(width: int) -> float:
    """Share of the peak that matrix products of [T, width] reach: 0.56 at 768, 0.64 at 2048, 0.67 at 4096."""
    return 0.7 * width / (width + 200)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of one GPU, by part; host: to queue it, beside the rest. wkv: None where it is not modelled.

    tokens, six_n, peak: of the step, of a token and of the GPU, for the speed and its share of the peak.
    """

    blocks: float
    head: float
    loss: float
    passes: float
    wkv: float | None
    casts: float
    update: float
    host: float
    tokens: int
    six_n: int
    peak: float

    @property
    def total(self) -> float:
        """Seconds: of the GPU, or of the host where that is slower."""
        device = sum(getattr(self, part) or 0.0 for part in PARTS if part != "host")
        return max(device, self.host)

    def text(self) -> str:
        """Table of the parts and the sum."""
        lines = ["predicted step of one GPU, ms: a model, not a measurement; without communication"]
        for part, words in PARTS.items():
            seconds = getattr(self, part)
            lines.append(f"  {words:<28}" + (" not modelled" if seconds is None else f"{seconds * 1e3:10.1f}"))
        speed = self.tokens / self.total
        most = "at most " if self.wkv is None else ""
        mfu = speed * self.six_n / self.peak
        lines.append(f"  {'step':<28}{self.total * 1e3:10.1f}  {most}{speed:,.0f} tokens/s, {mfu:.0%} MFU (6N)")
        return "\n".join(lines)

    def data(self) -> dict[str, float | None]:
        """Seconds by part and in all, and tokens per second, for JSON."""
        return {
            **{part: getattr(self, part) for part in PARTS},
            "total": self.total,
            "tokens_per_s": self.tokens / self.total,
        }


def predict(plan: RunPlan, gpu: str | None) -> StepTime:
    """Prediction for the configured setting of `plan` on the GPU of that name. Raises ConfigError without one."""
    if gpu is None:
        raise ConfigError("--step-time needs the GPU's rates", remedy="Give --gpu NAME")
    if plan.kernels.device != "cuda":
        raise ConfigError("--step-time is for GPUs, and training.accelerator is cpu", remedy="Set it to auto or cuda")
    return step_time(plan, find_gpu(gpu))


def step_time(plan: RunPlan, gpu: Gpu) -> StepTime:
    """Prediction for the configured setting of `plan` on `gpu`."""
    model, setting, kernels = plan.config.model, plan.configured.setting, plan.kernels
    assert model.vocab_size is not None
    micro_batches, item = plan.length.accumulate, ITEM_BYTES[plan.config.training.precision]
    tokens = setting.micro_bsz * model.ctx_len * micro_batches
    again = int(setting.grad_cp)  # forward passes of the blocks that are computed once more
    products = gpu.peak_tflops * 1e12 * product_share(model.n_embd) * (1 if item < FP32 else 0.5)  # TF32: half
    bandwidth = gpu.bandwidth_gb_per_s * 1e9 * BANDWIDTH_SHARE
    passes = _passes(model, kernels)
    moved = passes.training + again * passes.forward
    launches = passes.launches + again * passes.launches_forward
    stage, accumulates = setting.sharding.stage, setting.accumulates
    is_kept = keeps_copies(plan.config.training.precision, stage, accumulates=accumulates, grad_cp=setting.grad_cp)
    copies = COPY_BYTES * (1 if is_kept else micro_batches * (1 + again))
    of_head = COPY_BYTES * _in_fp32(plan, "head.") * (1 if is_kept else micro_batches)
    in_blocks = _in_fp32(plan, "blocks.") * (copies + GRADIENT_BYTES * micro_batches)
    casts = 0 if stage or item == FP32 else in_blocks + of_head
    backward = 2 if plan.config.adapter.kind == "none" else 1  # a frozen matrix has no gradient of its own
    parameters = count(plan.parameters.trained) / (setting.sharding.ranks if setting.sharding.stage else 1)
    return StepTime(
        blocks=tokens * plan.flops.blocks * (1 + backward + again) / products,
        head=tokens * plan.flops.head * (1 + backward) / products,
        loss=tokens * model.vocab_size * LOGIT_PASSES * item / bandwidth,
        passes=tokens * model.n_layer * model.n_embd * moved * item / bandwidth,
        wkv=_wkv(plan, gpu, tokens, bandwidth) if kernels.is_compiled else None,
        casts=casts / bandwidth,
        update=PARAMETER_BYTES * parameters / bandwidth,
        host=LAUNCH_SECONDS * launches * model.n_layer * micro_batches,
        tokens=tokens,
        six_n=plan.flops.six_n,
        peak=gpu.peak_tflops * 1e12,
    )


def _passes(model: ModelConfig, kernels: Kernels) -> Passes:
    version = version_of(model)
    if kernels.fused == "plain":
        return version.passes
    return version.passes_native if has_norm_mix(kernels.device, model.n_embd, 1) else version.passes_wide


def _in_fp32(plan: RunPlan, part: str) -> int:
    """Parameters of "blocks." or "head." that one process or DDP keeps in fp32: those that are trained."""
    shapes = plan.parameters.trained if plan.parameters.is_partial else plan.parameters.model
    return count({name: shape for name, shape in shapes.items() if name.startswith(part)})


def _wkv(plan: RunPlan, gpu: Gpu, tokens: int, bandwidth: float) -> float:
    """Seconds of WKV in a step, by the bytes of its inputs, outputs and states."""
    model, setting = plan.config.model, plan.configured.setting
    widths, item = model_dims(model), ITEM_BYTES[plan.config.training.precision]
    inputs = OPERATORS[version_of(model).operator].inputs
    state = (2 if plan.kernels.wkv == "tensor_cores" else FP32) * widths.head_size / STEPS_BETWEEN_STATES
    forward = (inputs + 1) * item + state  # for an element of [T,A]; backward reads one more, writes a gradient of each
    backward = (2 * inputs + 1) * item + state
    elements = tokens * widths.n_head * widths.head_size * model.n_layer
    heads, passes = setting.micro_bsz * widths.n_head, (forward * (1 + setting.grad_cp), backward)
    return sum(
        max(
            elements * size / bandwidth,
            elements * size / rate / gpu.multiprocessors * _wait(gpu, heads, kib),
        )
        for size, (rate, kib) in zip(passes, _wkv_forms(plan, gpu), strict=True)
    )


def _wkv_forms(plan: RunPlan, gpu: Gpu) -> tuple[tuple[float, float], tuple[float, float]]:
    """Rate and shared memory of a block of WKV's forward and of its backward pass."""
    of_16_steps = [(WKV_BYTES_PER_S, kib) for kib in WKV_BLOCK_KIB]
    if version_of(plan.config.model).operator != "wkv7" or plan.kernels.wkv != "tensor_cores":
        return of_16_steps[0], of_16_steps[1]
    forward, backward = ((WKV7_BYTES_PER_S, kib) for kib in WKV7_BLOCK_KIB)
    return forward, backward if gpu.shared_kib >= WKV_BLOCKS * backward[1] else of_16_steps[1]


def _wait(gpu: Gpu, heads: int, block_kib: float) -> float:
    """Time of a pass of WKV over that where every multiprocessor has two blocks all the time. heads: blocks in all."""
    fitting = min(WKV_BLOCKS, int(gpu.shared_kib / block_kib))
    if fitting == 1 or heads <= gpu.multiprocessors:  # one after the other
        return WKV_BLOCKS * WKV_ALONE * max(1.0, gpu.multiprocessors / heads)
    return max(1.0, WKV_BLOCKS * gpu.multiprocessors / heads)
