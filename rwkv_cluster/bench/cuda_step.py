"""Whole training steps on a GPU: tokens/s, memory and model FLOP utilisation of RWKV-7 at three widths, in bf16.

`rwkv-cluster bench step --device cuda`. Weights are plausible ones made on the device: the true initialisation of a
large model takes minutes of a CPU, and no figure depends on them. Each case is written where --output says and told as
soon as it is there; one that fails says why, and the others go on. MFU counts 6 FLOPs for each parameter but the
embedding's and token, and leaves the WKV operator out: its FLOPs in the recurrent form are given beside it (`flops`).
Beside the measured time is the one that `plan --step-time` predicts, where the GPU is a known one.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any

from rwkv_cluster.bench import results
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime.gpu_specs import gpu_of_device

if TYPE_CHECKING:
    from rwkv_cluster.model.rwkv import RWKV
    from rwkv_cluster.runtime.gpu_specs import Gpu

PRESETS = {
    "L12-D768": (12, 768, 16),
    "L24-D1024": (24, 1024, 8),
    "L24-D2048": (24, 2048, 2),
    "L32-D4096": (32, 4096, 1),
}
"""Layers, width and samples a step. What does not fit is cut to as many layers as do."""

VOCAB_SIZE = 65536


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the presets of `options`. Raises ConfigError where torch finds no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch finds no CUDA device here", remedy="Leave it out, or look at `rwkv-cluster doctor`"
        )
    name = torch.cuda.get_device_name()
    gpu = gpu_of_device(name)
    peak = options.peak_tflops or (gpu.peak_tflops if gpu else None)
    cases: dict[str, dict[str, Any]] = {}
    settings = {"device": name, "torch": torch.__version__, "peak_tflops": peak, "settings": vars(options)}
    for preset in options.presets:
        n_layer, n_embd, batch = PRESETS[preset]
        for grad_cp in (0, 1):
            fitting = _fitting(n_layer, n_embd, batch, grad_cp, options)
            if peak and "step_s" in fitting:
                fitting["mfu"] = fitting["model_flops"] / fitting["step_s"] / (peak * 1e12)
            if gpu and "step_s" in fitting:
                fitting["predicted_s"] = _predicted(fitting["n_layer"], n_embd, batch, grad_cp, options, gpu)
            case = f"{preset}{' grad_cp' if grad_cp else ''}"
            cases[case] = fitting
            results.keep(settings | {"cases": cases}, options.output, _line(case, fitting))
    return settings | {"cases": cases}


def format(result: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        f"{result['device']}, torch {result['torch']}, peak {result['peak_tflops'] or 'unknown'} TFLOP/s, "
        f"T {result['settings']['gpu_ctx_len']}",
        f"{'':22}{'layers':>7}{'batch':>6}{'tokens/s':>11}{'ms/step':>9}{'min':>8}{'max':>8}{'predicted':>11}"
        f"{'MFU %':>7}{'WKV TF':>8}{'GB':>7}",
    ]
    return "\n".join([*lines, *(_line(name, found) for name, found in result["cases"].items())])


def _line(name: str, c: dict[str, Any]) -> str:
    if "error" in c:
        return f"{name:22}  {c['error']}"
    mfu = f"{100 * c['mfu']:.1f}" if "mfu" in c else "-"
    predicted = f"{1e3 * c['predicted_s']['total']:.1f}" if "predicted_s" in c else "-"
    return (
        f"{name:22}{c['n_layer']:>7}{c['batch']:>6}{c['tokens_per_s']:>11,.0f}{1e3 * c['step_s']:>9.1f}"
        f"{1e3 * c['step_s_min']:>8.1f}{1e3 * c['step_s_max']:>8.1f}{predicted:>11}{mfu:>7}"
        f"{c['wkv_flops'] / 1e12:>8.2f}{c['peak_gb']:>7.1f}"
    )


def _fitting(n_layer: int, n_embd: int, batch: int, grad_cp: int, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of as many layers as fit, or {"error": why there are none}."""
    import torch

    from rwkv_cluster.train.memory.out_of_memory import is_out_of_memory

    while n_layer:
        try:
            return _measure(n_layer, n_embd, batch, grad_cp, options)
        except Exception as error:  # whatever it is, the other cases go on
            if is_out_of_memory(error):
                n_layer //= 2
                continue
            return {"error": f"{type(error).__name__}: {f'{error} '.splitlines()[0][:160]}"}
        finally:
            gc.collect()  # the model is in circles with its gradients
            torch.cuda.empty_cache()
    return {"error": "does not fit"}


def _measure(n_layer: int, n_embd: int, batch: int, grad_cp: int, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from rwkv_cluster.config import ModelConfig, TrainingConfig
    from rwkv_cluster.model.flops import flops_per_token
    from rwkv_cluster.model.loss import next_token_loss
    from rwkv_cluster.model.rwkv import RWKV
    from rwkv_cluster.train.optimizers.param_groups import build_optimizer

    config = ModelConfig(
        model_type="x070", n_layer=n_layer, n_embd=n_embd, ctx_len=options.gpu_ctx_len, vocab_size=VOCAB_SIZE
    )
    with torch.device(options.device):
        model = RWKV(config, grad_cp=bool(grad_cp), wkv_backend=options.wkv_backend, fused=options.fused)
    _fill(model)
    model.compute_dtype = torch.bfloat16
    optimizer = build_optimizer(model, "x070", TrainingConfig())
    tokens = torch.randint(0, VOCAB_SIZE, (batch, options.gpu_ctx_len + 1), device=options.device)

    def step() -> None:
        next_token_loss(model, tokens, l2wrap=1e-4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(options.repeats + 3):  # three to warm up
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    seconds = seconds[3:]
    n_tokens = batch * options.gpu_ctx_len
    flops = flops_per_token(config)
    return {
        "n_layer": n_layer,
        "batch": batch,
        "tokens_per_s": n_tokens / statistics.median(seconds),
        "step_s": statistics.median(seconds),
        "step_s_min": min(seconds),
        "step_s_max": max(seconds),
        "model_flops": flops.six_n * n_tokens,
        "wkv_flops": 3 * flops.wkv * n_tokens,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def _predicted(
    n_layer: int, n_embd: int, batch: int, grad_cp: int, options: argparse.Namespace, gpu: Gpu
) -> dict[str, float | None]:
    """Seconds of the step by part and in all, as `plan --step-time` has them."""
    from rwkv_cluster.config import Config
    from rwkv_cluster.planning.options import Assumptions
    from rwkv_cluster.planning.run_plan import plan_run
    from rwkv_cluster.planning.step_time import step_time

    training = {"micro_bsz": batch, "grad_cp": grad_cp, "precision": "bf16", "accelerator": "cuda", "max_steps": 1}
    with tempfile.TemporaryDirectory() as nowhere:
        config = Config.model_validate(
            {
                "work_dir": nowhere,
                "data": {"tokenizer": {"type": "integer", "max_value": VOCAB_SIZE - 2}},
                "model": {"n_layer": n_layer, "n_embd": n_embd, "ctx_len": options.gpu_ctx_len},
                "training": {**training, "wkv_backend": options.wkv_backend, "fused": options.fused},
            }
        )
        plan = plan_run(config, Assumptions(1, None, None, gpu.peak_tflops, gpu.memory_gb))
    return step_time(plan, gpu).data()


def _fill(model: RWKV) -> None:
    """Random matrices of a trained model's size, made where they are; vectors as `initialize` has them."""
    import torch

    from rwkv_cluster.model.init import initial_value, vectors_of_block

    vectors = {
        f"blocks.{layer}.{name}"
        for layer in range(model.config.n_layer)
        for name in vectors_of_block(model.config, layer)
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in vectors or parameter.ndim == 1:
                parameter.copy_(initial_value(model.config, name, parameter.shape, 0))
            else:
                parameter.normal_(std=0.5 / max(parameter.shape) ** 0.5)
