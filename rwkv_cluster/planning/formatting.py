"""A plan as text for people, and as data for programs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rwkv_cluster.adapters.table import STATE, rate_warning, targets
from rwkv_cluster.model.parameter_shapes import count
from rwkv_cluster.planning.run_length import UNKNOWN
from rwkv_cluster.planning.run_plan import Row, RunPlan
from rwkv_cluster.train.memory.model_states import Sharding
from rwkv_cluster.train.memory.peak import ALLOWANCE, Setting, needed

_NAME, _CELL = 38, 10  # columns
_TITLE = 14  # columns of a row's name
_PICTURE_ROWS = 5
_STATES = ("weights", "gradients", "masters", "moments", "buckets", "gathered")


def text(plan: RunPlan) -> str:
    """Text of a plan: rows of a name and a value, and the table of memory."""
    rows = {
        "model": _model(plan),
        "parameters": _parameters(plan),
        **_trained(plan),
        "batch": _batch(plan),
        **_samples(plan),
        "length": _length(plan),
        "learning rate": _learning_rate(plan),
        **_warning(plan),
        "FLOPs a token": _flops(plan),
        **_grad_cp(plan),
        "disk": _disk(plan),
        "host memory": _host(plan),
        "time": _time(plan),
    }
    lines = [f"{name:<{_TITLE}} {value}" for name, value in rows.items()]
    return "\n".join([*lines, "", *_memory(plan), "", *_verdict(plan)])


def data(plan: RunPlan) -> dict[str, Any]:
    """Data of a plan for JSON: bytes, seconds and operations; None for what is not known."""
    run, flops = plan.length, plan.flops
    return {
        "work_dir": plan.config.work_dir,
        "model": plan.config.model.model_dump(mode="json"),
        "ranks": plan.assumptions.ranks,
        "parameters": {"total": count(plan.shapes), "trained": count(plan.parameters.trained), "by_part": plan.parts},
        "accumulate_grad_batches": run.accumulate,
        "global_batch_size": run.global_batch_size,
        "tokens_per_step": run.tokens_per_step,
        "total_steps": run.horizon.total_steps if run.horizon else None,
        "total_tokens": run.horizon.total_steps * run.tokens_per_step if run.horizon else None,
        "epochs": run.epochs,
        "trained_tokens": plan.manifest.n_trained if plan.manifest else None,
        "packing": plan.manifest.packing.model_dump() if plan.manifest and plan.manifest.packing else None,
        "learning_rates": [{"step": step, "lr": rate} for step, rate in plan.learning_rates.items()],
        "flops_per_token": {
            "parameters": flops.parameters,
            "six_n": flops.six_n,
            "forward": {"blocks": flops.blocks, "wkv": flops.wkv, "head": flops.head, "total": flops.forward},
            "training": flops.training,
            "hardware": flops.hardware(grad_cp=plan.configured.setting.grad_cp),
        },
        "grad_cp": int(plan.configured.setting.grad_cp),
        "kernels": vars(plan.kernels),
        "memory": [_row_data(row) for row in plan.rows],
        "gpu_memory_gb": plan.assumptions.gpu_memory_gb,
        "to_fit": _overrides(plan, plan.to_fit) if plan.to_fit else None,
        "host_bytes": plan.configured.memory.host,
        "host_checkpoint_bytes": plan.host_copy,
        "disk": vars(plan.disk),
        "tokens_per_s": plan.tokens_per_s,
        "seconds": plan.seconds,
    }


def _row_data(row: Row) -> dict[str, Any]:
    memory, sharding = row.memory, row.setting.sharding
    return {
        "name": sharding_name(sharding),
        "configured": row.is_configured,
        "zero_stage": sharding.stage,
        "offload_optimizer": sharding.offload_optimizer,
        "offload_parameters": sharding.offload_parameters,
        "grad_cp": int(row.setting.grad_cp),
        "micro_bsz": row.setting.micro_bsz,
        **{name: getattr(memory.states, name) for name in _STATES},
        "activations": memory.activations,
        "head": memory.head,
        "peak": memory.peak,
        "peak_at": memory.peak_at,
        "needed": needed(memory),
        "host": memory.host,
        "fits": row.fits,
    }


def _model(plan: RunPlan) -> str:
    model = plan.config.model
    return (
        f"{model.model_type}, {model.n_layer} layers, width {model.n_embd}, head size {model.head_size_a}, vocabulary "
        f"{model.vocab_size:,}, samples of {model.ctx_len:,} tokens, {plan.config.training.precision}"
    )


def _parameters(plan: RunPlan) -> str:
    parts = ", ".join(f"{name} {number:,}" for name, number in plan.parts.items() if number)
    return f"{count(plan.shapes):,}: {parts}"


def _trained(plan: RunPlan) -> dict[str, str]:
    """A row where only some are trained: how many, and which, with the number of layers that have them."""
    if not plan.parameters.is_partial:
        return {}
    trained, adapter, kind = list(plan.parameters.trained), plan.config.adapter, ""
    if adapter.kind not in ("none", STATE):
        trained, kind = targets(adapter, plan.shapes), f"{adapter.kind} of rank {adapter.rank} beside "
    names = Counter(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in trained)
    which = ", ".join(f"{name} ({number})" if number > 1 else name for name, number in names.items())
    number = count(plan.parameters.trained)
    return {"trained": f"{number:,}, {number / count(plan.shapes):.2%}: {kind}{which}"}


def _batch(plan: RunPlan) -> str:
    run, ranks = plan.length, plan.assumptions.ranks
    product = f"micro_bsz {plan.config.training.micro_bsz} * {_several(ranks, 'rank')}"
    product += f" * {_several(run.accumulate, 'micro batch', 'es')}"
    return f"{product} = {_several(run.global_batch_size, 'sample')}, {run.tokens_per_step:,} tokens a step"


def _samples(plan: RunPlan) -> dict[str, str]:
    """A row where the data is prepared and not one stream of which everything is trained on."""
    words = plan.manifest.samples_in_words if plan.manifest else None
    return {"samples": words} if words else {}


def _length(plan: RunPlan) -> str:
    run = plan.length
    if run.horizon is None:
        return UNKNOWN
    tokens = run.horizon.total_steps * run.tokens_per_step
    most = "at most " if run.is_upper_bound else ""
    epochs = "epochs unknown until the data is prepared" if run.epochs is None else f"{run.epochs:.3g} epochs"
    return f"{most}{_several(run.horizon.total_steps, 'step')}, {tokens:,} tokens, {epochs}"


def _learning_rate(plan: RunPlan) -> str:
    if not plan.learning_rates:
        return (
            f"{plan.config.training.lr_init:g} to {plan.config.training.lr_final:g}, along a run whose end is unknown"
        )
    rates = ", ".join(f"step {step:,}: {rate:.3g}" for step, rate in plan.learning_rates.items())
    return "\n".join([f"{plan.config.training.schedule}; {rates}", *picture(plan.lr_curve)])


def picture(values: Sequence[float], low: float = 0.0) -> list[str]:
    """A picture of characters with a column for each value. low: the value at its foot."""
    top = max(values)
    heights = [round((value - low) / (top - low) * _PICTURE_ROWS) if top > low else 0 for value in values]
    rows = ["".join("#" if height >= row else " " for height in heights) for row in range(_PICTURE_ROWS, 0, -1)]
    labels = [f"{top:.3g}", *[""] * (_PICTURE_ROWS - 1)]
    lines = [f"{label:>{_TITLE}} |{row}".rstrip() for label, row in zip(labels, rows, strict=True)]
    return [*lines, f"{f'{low:.3g}':>{_TITLE}} +{'-' * len(values)}"]


def _warning(plan: RunPlan) -> dict[str, str]:
    """A row where the learning rate does not fit what is trained."""
    config = plan.config
    warning = rate_warning(config.adapter, config.training, config.model.model_type)
    return {"warning": warning} if warning else {}


def _flops(plan: RunPlan) -> str:
    flops = plan.flops
    shares = ", ".join(f"{name} {getattr(flops, name) / flops.forward:.1%}" for name in ("blocks", "wkv", "head"))
    more = f"; with what grad_cp computes again {flops.hardware(grad_cp=True):.4g}"
    again = more if plan.configured.setting.grad_cp else ""
    return f"6N {flops.six_n:.4g} (N {flops.parameters:,} without emb); counted {flops.training:.4g} ({shares}){again}"


def _grad_cp(plan: RunPlan) -> dict[str, str]:
    """A row where training.grad_cp is auto."""
    if plan.config.training.grad_cp != "auto":
        return {}
    if plan.grad_cp is None:
        return {"grad_cp": "auto: chosen on the GPU, taken as 1 here; give --gpu NAME or --gpu-memory-gb G"}
    return {"grad_cp": str(plan.grad_cp)}


def _disk(plan: RunPlan) -> str:
    disk = plan.disk
    exports = "exports unknown" if disk.exports is None else f"{_gb(disk.exports)} of exports"
    tokens = "data not prepared" if disk.data is None else f"{_gb(disk.data)} of data"
    return (
        f"checkpoint {_gb(disk.checkpoint)}, weights {_gb(disk.weights)}; needed {_gb(disk.checkpoints)} for "
        f"{plan.config.checkpoint.keep_last} checkpoints and one under way, {exports}, {tokens}; free {_gb(disk.free)}"
    )


def _host(plan: RunPlan) -> str:
    offloaded, on_gpu = plan.configured.memory.host, plan.kernels.device == "cuda"
    copies = on_gpu if plan.config.checkpoint.background is None else plan.config.checkpoint.background
    parts = [f"{_gb(offloaded)} of each rank, offloaded"] if offloaded else []
    who = "each rank" if plan.configured.setting.sharding.stage else "rank 0"
    parts += [f"{_gb(plan.host_copy)} on {who} while a checkpoint is written"] if copies else []
    return "; ".join(parts) or "no tensors of training beside the data"


def _time(plan: RunPlan) -> str:
    if plan.tokens_per_s is None:
        return "give --tokens-per-s X, or --mfu 0.4 with --gpu NAME or --peak-tflops P"
    speed = f"at {plan.tokens_per_s:,.0f} tokens/s"
    if plan.seconds is None:
        return f"unknown, because the end is; {speed}"
    hours, rest = divmod(round(plan.seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d} {speed}, without start, evaluations and saves"


def _memory(plan: RunPlan) -> list[str]:
    kernels, limit = plan.kernels, plan.assumptions.gpu_memory_gb
    where = f"{kernels.device}, WKV {kernels.wkv.replace('_', ' ')}, fused {kernels.fused}"
    unit, size = ("GB", 1e9) if plan.configured.memory.peak >= 1e9 else ("MB", 1e6)
    marks = "* configured" + (f", + fits {limit:g} GB" if limit is not None else "")
    lines = [
        f"{unit} of a rank at its peak, micro_bsz {plan.config.training.micro_bsz}; {where}; {marks}",
        f"{'':{_NAME + _CELL * len(_STATES)}}{'without grad_cp':>20}{'with grad_cp':>20}",
        f"{'':{_NAME}}" + "".join(f"{name:>{_CELL}}" for name in _STATES) + f"{'saved':>10}{'peak':>8}  " * 2,
    ]
    pairs = zip(plan.rows[::2], plan.rows[1::2], strict=True)
    return [line.rstrip() for line in (*lines, *(_pair(*pair, size) for pair in pairs))]


def _pair(without: Row, checkpointed: Row, size: float) -> str:
    states = without.memory.states
    cells = "".join(f"{getattr(states, name) / size:>{_CELL}.2f}" for name in _STATES)
    for row in (without, checkpointed):
        mark = ("*" if row.is_configured else " ") + ("+" if row.fits else " ")
        cells += f"{row.memory.activations / size:>10.2f}{row.memory.peak / size:>8.2f}{mark}"
    return f"{sharding_name(without.setting.sharding):{_NAME}}{cells}"


def sharding_name(sharding: Sharding) -> str:
    """A sharding in words."""
    if sharding.stage is None:
        return "one process" if sharding.ranks == 1 else "DDP"
    moved = ["optimizer"] * sharding.offload_optimizer + ["parameters"] * sharding.offload_parameters
    return f"ZeRO {sharding.stage}" + (f", {' + '.join(moved)} in host" if moved else "")


def _verdict(plan: RunPlan) -> list[str]:
    """Whether the configured setting fits, and else what to change first."""
    limit = plan.assumptions.gpu_memory_gb
    if limit is None:
        return ["Give --gpu NAME or --gpu-memory-gb G to see what fits."]
    configured = plan.configured
    factor, context = ALLOWANCE
    need = f"{needed(configured.memory) / 1e9:.1f} GB: the peak, {factor - 1:.0%} and {context / 1e9:g} GB for CUDA"
    if configured.fits:
        return [f"The configured setting fits {limit:g} GB: it needs {need}."]
    refusal = f"The configured setting does not fit {limit:g} GB: it needs {need}. "
    if plan.to_fit is not None:
        options = " ".join(f"--{change}" for change in _overrides(plan, plan.to_fit))
        return [f"{refusal}Change first: {options}"]
    return [f"{refusal}No setting does. Use more ranks, a larger GPU, or a smaller model.ctx_len or model"]


def _overrides(plan: RunPlan, setting: Setting) -> list[str]:
    """Fields to add to the command line for `setting`; the global batch stays as it is."""
    configured, changes = plan.configured.setting, []
    if setting.grad_cp != configured.grad_cp:
        changes.append(f"training.grad_cp={int(setting.grad_cp)}")
    if setting.micro_bsz != configured.micro_bsz:
        changes += [f"training.micro_bsz={setting.micro_bsz}"]
        changes += [f"training.global_batch_size={plan.length.global_batch_size}"]
        if plan.config.training.accumulate_grad_batches is not None:
            changes.append("training.accumulate_grad_batches=null")
    return changes + (setting.sharding.overrides if setting.sharding != configured.sharding else [])


def _several(number: int, word: str, plural: str = "s") -> str:
    return f"{number:,} {word}{plural if number != 1 else ''}"


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e7 else f"{n_bytes / 1e6:,.2f} MB"
