"""Assumptions of a plan that come from its options, because no configuration says it: ranks, speed, GPU."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rwkv_cluster.config import Config
from rwkv_cluster.config.schema import ranks_per_node
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime.gpu_specs import Gpu, find_gpu

MOST_RANKS = 1_000_000


@dataclass(frozen=True)
class Assumptions:
    """Ranks of the run, tokens_per_s of all ranks or mfu instead of it, and a GPU. None where nothing was said."""

    ranks: int
    tokens_per_s: float | None
    mfu: float | None
    peak_tflops: float | None
    gpu_memory_gb: float | None

    @classmethod
    def of(
        cls,
        config: Config,
        *,
        ranks: str | None = None,
        tokens_per_s: str | None = None,
        mfu: str | None = None,
        peak_tflops: str | None = None,
        gpu: str | None = None,
        gpu_memory_gb: str | None = None,
    ) -> Assumptions:
        """Assumptions from the options as typed. Raises ConfigError for one that is no sensible number."""
        known: Gpu | None = find_gpu(gpu) if gpu else None
        assumptions = cls(
            ranks=_count("--ranks", ranks) or config.launch.num_nodes * ranks_per_node(config),
            tokens_per_s=_number("--tokens-per-s", tokens_per_s),
            mfu=_number("--mfu", mfu, largest=1.0),
            peak_tflops=_number("--peak-tflops", peak_tflops) or (known.peak_tflops if known else None),
            gpu_memory_gb=_number("--gpu-memory-gb", gpu_memory_gb) or (known.memory_gb if known else None),
        )
        if assumptions.mfu is not None and assumptions.peak_tflops is None:
            raise ConfigError("--mfu needs the GPU's peak", remedy="Give --gpu NAME or --peak-tflops P")
        if assumptions.mfu is not None and assumptions.tokens_per_s is not None:
            raise ConfigError("--mfu and --tokens-per-s both say the speed", remedy="Give one of them")
        return assumptions


def _count(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,7}", text) or not 1 <= int(text) <= MOST_RANKS:
        raise ConfigError(f"{option} is {text[:40]!a}, expected an integer from 1 to {MOST_RANKS:,}")
    return int(text)


def _number(option: str, text: str | None, largest: float = math.inf) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf and value <= largest):
        expected = "a number > 0" if largest == math.inf else f"a number > 0 and <= {largest:g}"
        raise ConfigError(f"{option} is {text[:40]!a}, expected {expected}")
    return value
