"""Whole training steps on a GPU: tokens/s, memory and model FLOP utilisation of RWKV-7 at three widths, in bf16.

`rwkv-cluster bench step --device cuda`. MFU counts 6 FLOPs for each parameter but the embedding's and token, and leaves
the WKV operator out: its FLOPs in the recurrent form are given beside it (`flops`). Peaks: `gpus`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from rwkv_cluster.errors import ConfigError
from rwkv_cluster.gpus import gpu_of_device

PRESETS = {"L12-D768": (12, 768, 16), "L24-D2048": (24, 2048, 4), "L32-D4096": (32, 4096, 1)}
"""Layers, width and samples a step. The last is cut to as many layers as fit."""

VOCAB_SIZE = 65536


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the presets of `options`. Raises ConfigError where torch finds no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch finds no CUDA device here. Leave it out, or look at `rwkv-cluster doctor`"
        )
    name = torch.cuda.get_device_name()
    gpu = gpu_of_device(name)
    peak = options.peak_tflops or (gpu.peak_tflops if gpu else None)
    cases = {}
    for preset in options.presets:
        n_layer, n_embd, batch = PRESETS[preset]
        for grad_cp in (0, 1):
            found = _fitting(n_layer, n_embd, batch, grad_cp, options)
            if found and peak:
                found["mfu"] = found["model_flops"] / found["step_s"] / (peak * 1e12)
            cases[f"{preset}{' grad_cp' if grad_cp else ''}"] = found
    return {"device": name, "torch": torch.__version__, "peak_tflops": peak, "settings": vars(options), "cases": cases}


def format(result: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        f"{result['device']}, torch {result['torch']}, peak {result['peak_tflops'] or 'unknown'} TFLOP/s, "
        f"T {result['settings']['gpu_ctx_len']}",
        f"{'':22}{'layers':>7}{'batch':>6}{'tokens/s':>11}{'ms/step':>9}{'min':>8}{'max':>8}{'MFU %':>7}"
        f"{'WKV TF':>8}{'GB':>7}",
    ]
    for name, c in result["cases"].items():
        if c is None:
            lines.append(f"{name:22}  does not fit")
            continue
        mfu = f"{100 * c['mfu']:.1f}" if "mfu" in c else "-"
        lines.append(
            f"{name:22}{c['n_layer']:>7}{c['batch']:>6}{c['tokens_per_s']:>11,.0f}{1e3 * c['step_s']:>9.1f}"
            f"{1e3 * c['step_s_min']:>8.1f}{1e3 * c['step_s_max']:>8.1f}{mfu:>7}{c['wkv_flops'] / 1e12:>8.2f}"
            f"{c['peak_gb']:>7.1f}"
        )
    return "\n".join(lines)


def _fitting(n_layer: int, n_embd: int, batch: int, grad_cp: int, options: argparse.Namespace) -> dict[str, Any] | None:
    import torch

    while n_layer:
        try:
            return _measure(n_layer, n_embd, batch, grad_cp, options)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            n_layer //= 2
    return None


def _measure(n_layer: int, n_embd: int, batch: int, grad_cp: int, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from rwkv_cluster.config import ModelConfig, TrainingConfig
    from rwkv_cluster.flops import flops_per_token
    from rwkv_cluster.model.init import initialize
    from rwkv_cluster.model.loss import next_token_loss
    from rwkv_cluster.model.rwkv import RWKV
    from rwkv_cluster.train.optimizer import build_optimizer

    config = ModelConfig(
        model_type="x070", n_layer=n_layer, n_embd=n_embd, ctx_len=options.gpu_ctx_len, vocab_size=VOCAB_SIZE
    )
    model = RWKV(config, grad_cp=bool(grad_cp), wkv_backend=options.wkv_backend, fused=options.fused)
    initialize(model, 0)
    model = model.to(options.device)
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
