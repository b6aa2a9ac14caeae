"""Whole training steps per second: this package, and the package rwkv-trainer where it is at hand, in turns.

Each contender lives in a process of its own and makes one step (forward, backward, AdamW) when told to; the parent
alternates between them, so that a machine whose speed drifts treats both alike. Times are of the whole step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from rwkv_cluster.bench import cuda_step


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="rwkv-cluster bench step", description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--model-type", default="x070", choices=["x052", "x060", "x070"])
    arguments.add_argument("--n-layer", type=int, default=6)
    arguments.add_argument("--n-embd", type=int, default=256)
    arguments.add_argument("--head-size", type=int, default=64)
    arguments.add_argument("--vocab-size", type=int, default=256)
    arguments.add_argument("--batch", type=int, default=4, help="samples in a step")
    arguments.add_argument("--ctx-len", type=int, default=512)
    arguments.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    arguments.add_argument("--grad-cp", type=int, default=0, choices=[0, 1])
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--repeats", type=int, default=5, help="counted steps of each, after one that is not")
    arguments.add_argument("--wkv-backend", default="auto", help="training.wkv_backend")
    arguments.add_argument("--fused", default="auto", help="training.fused")
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument(
        "--presets",
        nargs="+",
        choices=list(cuda_step.PRESETS),
        default=list(cuda_step.PRESETS),
        help="models of --device cuda",
    )
    arguments.add_argument("--gpu-ctx-len", type=int, default=4096, help="context of --device cuda")
    arguments.add_argument(
        "--output", help="file that --device cuda writes after each case, as --json prints in the end"
    )
    arguments.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the GPU, where it is not a known one")
    arguments.add_argument("--seed-package", help="folder that contains rwkv_trainer; default: the installed one")
    arguments.add_argument("--worker", choices=["ours", "rwkv-trainer"], help=argparse.SUPPRESS)
    return arguments


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure as the arguments say. Times in seconds, memory in MB; ratios are pair by pair."""
    options = parser().parse_args(arguments)
    if options.device == "cuda":
        return cuda_step.run(options)
    workers = {"ours": _Worker("ours", arguments, options.threads)}
    workers["ours"].require_ready()
    if options.model_type == "x070":  # the only version that rwkv-trainer runs without CUDA
        rival = _Worker("rwkv-trainer", arguments, options.threads)
        if rival.is_ready:
            workers["rwkv-trainer"] = rival
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for index in range(options.repeats + 1):
        for name, worker in workers.items():
            figures = worker.step()
            if index:
                rounds[name].append(figures)
    for worker in workers.values():
        worker.end()
    return _summary(vars(options), rounds, options.batch * options.ctx_len)


class _Worker:
    """A process that makes one step whenever it is asked to."""

    def __init__(self, name: str, arguments: Sequence[str], threads: int) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rwkv_cluster.bench.step", *arguments, "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self.is_ready = self._answer() is not None

    def require_ready(self) -> None:
        if not self.is_ready:
            self._errors.seek(0)
            raise RuntimeError(f"the benchmark's worker ended: {self._errors.read()}")

    def step(self) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        figures = self._answer()
        self.is_ready = figures is not None
        self.require_ready()
        return figures or {}

    def _answer(self) -> dict[str, float] | None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        return None

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def _summary(settings: dict[str, Any], rounds: dict[str, list[dict[str, float]]], tokens: int) -> dict[str, Any]:
    results = {
        name: {
            "cpu_s": _spread([figures["cpu_s"] for figures in steps]),
            "wall_s": _spread([figures["wall_s"] for figures in steps]),
            "tokens_per_cpu_s": tokens / statistics.median(figures["cpu_s"] for figures in steps),
            "peak_mb": max(figures["peak_mb"] for figures in steps),
        }
        for name, steps in rounds.items()
    }
    summary: dict[str, Any] = {"settings": settings, "results": results}
    if "rwkv-trainer" in rounds:
        pairs = zip(rounds["rwkv-trainer"], rounds["ours"], strict=True)
        summary["speedup"] = _spread([theirs["cpu_s"] / ours["cpu_s"] for theirs, ours in pairs])
    return summary


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def format(result: dict[str, Any]) -> str:
    """The figures as a table."""
    if "cases" in result:
        return cuda_step.format(result)
    lines = [f"{'':14}{'tokens/cpu-s':>14}{'cpu s/step':>12}{'wall s/step':>13}{'peak MB':>10}"]
    for name, row in result["results"].items():
        lines.append(
            f"{name:14}{row['tokens_per_cpu_s']:14,.0f}{row['cpu_s']['median']:12.3f}"
            f"{row['wall_s']['median']:13.3f}{row['peak_mb']:10,.0f}"
        )
    if "speedup" in result:
        ratio = result["speedup"]
        lines.append(f"speed-up over rwkv-trainer: {ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})")
    else:
        lines.append("rwkv-trainer is not at hand (or has no CPU path for this model): no comparison")
    return "\n".join(lines)


def _our_step(options: argparse.Namespace) -> Callable[[], None]:
    import torch

    from rwkv_cluster.config import ModelConfig, TrainingConfig
    from rwkv_cluster.model.init import initialize
    from rwkv_cluster.model.loss import next_token_loss
    from rwkv_cluster.model.rwkv import RWKV
    from rwkv_cluster.runtime.malloc import keep_freed_memory
    from rwkv_cluster.train.optimizers.param_groups import build_optimizer
    from rwkv_cluster.train.placement import DTYPES

    config = ModelConfig(
        model_type=options.model_type,
        n_layer=options.n_layer,
        n_embd=options.n_embd,
        head_size_a=options.head_size,
        ctx_len=options.ctx_len,
        vocab_size=options.vocab_size,
    )
    keep_freed_memory()
    model = RWKV(config, grad_cp=bool(options.grad_cp), wkv_backend=options.wkv_backend, fused=options.fused)
    initialize(model, 0)
    model.compute_dtype = DTYPES[options.precision]
    optimizer = build_optimizer(model, config.model_type, TrainingConfig())
    tokens = torch.randint(0, options.vocab_size, (options.batch, options.ctx_len + 1))

    def step() -> None:
        next_token_loss(model, tokens, l2wrap=1e-4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _rival_step(options: argparse.Namespace) -> Callable[[], None]:
    """rwkv-trainer 0.1.27: its own model class, loss and loop over time, with AdamW on all parameters."""
    if options.seed_package:
        sys.path.insert(0, options.seed_package)
    os.environ |= {
        "RWKV_MY_TESTING": options.model_type,
        "RWKV_HEAD_SIZE_A": str(options.head_size),
        "RWKV_CTXLEN": str(options.ctx_len),
        "RWKV_FLOAT_MODE": options.precision,
        "RWKV_TORCH_FALLBACK": "1",
        "RWKV_JIT_ON": "1",
    }
    import torch
    from rwkv_trainer.model.model import RWKV  # type: ignore[import-not-found]

    names = argparse.Namespace(
        n_layer=options.n_layer, n_embd=options.n_embd, dim_att=options.n_embd, dim_ffn=options.n_embd * 4,
        vocab_size=options.vocab_size, ctx_len=options.ctx_len, head_size_a=options.head_size, head_size_divisor=8,
        dropout=0.0, grad_cp=options.grad_cp, my_testing=options.model_type, tiny_att_dim=0, tiny_att_layer=0,
        head_qk=0, my_qa_mask=0, pre_ffn=0, my_pos_emb=0, my_pile_stage=3, train_type="",
        layerwise_lr=1, accelerator="CPU", lr_init=6e-4, betas=(0.9, 0.99), adam_eps=1e-18, weight_decay=0.0,
    )  # fmt: skip
    model = RWKV(names)
    initial = model.generate_init_weight()
    model.load_state_dict(initial)
    model = model.to(torch.bfloat16 if options.precision == "bf16" else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.99), eps=1e-18)
    tokens = torch.randint(0, options.vocab_size, (options.batch, options.ctx_len + 1))

    def step() -> None:
        model.training_step((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), 0).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _work(options: argparse.Namespace) -> None:
    """Worker: say ready, then make a step for every line on stdin and print its figures."""
    import resource

    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    step = _our_step(options) if options.worker == "ours" else _rival_step(options)
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        figures = {
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        }
        sys.stdout.write(json.dumps(figures) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _work(parser().parse_args())
