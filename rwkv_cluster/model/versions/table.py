"""Table of the model versions: a row a version, and the functions that the row names. Torch-free.

A further version is a row here and a file beside this one with its blocks and initial values; and its name in
`rwkv_cluster.config.schema.ModelType`, so that a configuration may say it.

C width, A attention width, F channel-mix width, H heads, N head size; ranks M, Dw, Da, Dv, Dg.
"""

from __future__ import annotations

import math

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.model.versions.version import ModelDims, Passes, SavedTensors, Shapes, Version

_ATT = "blocks.0.att."


def version_of(config: ModelConfig) -> Version:
    """The row of `config.model_type`."""
    return VERSIONS[config.model_type]


def _no_ranks(_: object) -> dict[str, int]:
    return {}


def _ffn_of_rwkv5(C: int) -> int:
    """3.5 C rounded down to a multiple of 32: RWKV-LM's default for RWKV-5 and RWKV-6."""
    return int(3.5 * C) // 32 * 32


def _time_mix_of_rwkv5(widths: ModelDims) -> Shapes:
    vectors = {f"time_mix_{name}": (1, 1, widths.embd) for name in "kvrg"}
    per_head = dict.fromkeys(("time_decay", "time_faaaa"), (widths.n_head, widths.head_size))
    return {**vectors, **per_head, **_matrices(widths, ("receptance", "key", "value", "gate"))}


def _matrices(widths: ModelDims, inputs: tuple[str, ...]) -> Shapes:
    into = {f"{name}.weight": (widths.att, widths.embd) for name in inputs}
    return {**into, "output.weight": (widths.embd, widths.att)}


def _channel_mix_of_rwkv5(widths: ModelDims) -> Shapes:
    return _gated_channel_mix(widths, "time_mix")


def _gated_channel_mix(widths: ModelDims, mix: str) -> Shapes:
    C, F = widths.embd, widths.ffn
    vectors = dict.fromkeys((f"{mix}_k", f"{mix}_r"), (1, 1, C))
    return {**vectors, "key.weight": (F, C), "value.weight": (C, F), "receptance.weight": (C, C)}


def _recognises_rwkv5(shapes: Shapes) -> bool:
    """Whether there is a gate, which came with 5.1, and a decay for every channel, which came with 5.2."""
    decay = shapes.get(_ATT + "time_decay", ())
    return _ATT + "gate.weight" in shapes and len(decay) == 2 and decay[1] > 1


def _group_of_rwkv5(name: str, is_matrix: bool) -> tuple[float, bool]:
    """RWKV-LM's RWKV-v5/src/model.py, for RWKV-5 and RWKV-6."""
    if "_w1" in name or "_w2" in name or "time_mix" in name or "time_maa" in name:
        return 1.0, False
    if "time_sta" in name:
        return 1.0, True
    if "time_decay" in name:
        return 2.0, False
    return 1.0, is_matrix


def _default_ranks_of_rwkv6(_: int) -> dict[str, int]:
    return {"mix": 32, "decay": 64}


def _time_mix_of_rwkv6(widths: ModelDims) -> Shapes:
    C, A, M, Dw = widths.embd, widths.att, widths.mix_rank, widths.decay_rank
    return {
        **{f"time_maa_{name}": (1, 1, C) for name in "xwkvrg"},
        "time_maa_w1": (C, 5 * M),
        "time_maa_w2": (5, M, C),
        "time_decay": (1, 1, A),
        "time_decay_w1": (C, Dw),
        "time_decay_w2": (Dw, A),
        "time_faaaa": (widths.n_head, widths.head_size),
        **_matrices(widths, ("receptance", "key", "value", "gate")),
    }


def _channel_mix_of_rwkv6(widths: ModelDims) -> Shapes:
    return _gated_channel_mix(widths, "time_maa")


def _recognises_rwkv6(shapes: Shapes) -> bool:
    return _ATT + "time_maa_x" in shapes


def _ranks_of_rwkv6(shapes: Shapes) -> dict[str, int | bool | None]:
    return {
        "mix_lora_rank": shapes[_ATT + "time_maa_w1"][1] // 5,
        "decay_lora_rank": shapes[_ATT + "time_decay_w1"][1],
    }


def _ffn_of_rwkv7(C: int) -> int:
    return 4 * C


def _default_ranks_of_rwkv7(C: int) -> dict[str, int]:
    """Ranks by RWKV-LM's train_temp rule."""
    return {"decay": _rank(2.5, C), "a": _rank(2.5, C), "v": _rank(1.7, C), "gate": _rank(5.0, C)}


def _rank(factor: float, C: int) -> int:
    """factor * sqrt(C) to the nearest multiple of 32 (half to even), at least 32."""
    return max(32, 32 * round(factor * math.sqrt(C) / 32))


def _time_mix_of_rwkv7(widths: ModelDims) -> Shapes:
    C = widths.embd
    ranks = {"w": widths.decay_rank, "a": widths.a_rank, "g": widths.gate_rank, "v": widths.v_rank}
    vectors = [f"x_{name}" for name in "rwkvag"] + ["k_k", "k_a", "w0", "a0", "v0"]
    return {
        **{name: (1, 1, C) for name in vectors},
        **{f"{name}1": (C, rank) for name, rank in ranks.items()},
        **{f"{name}2": (rank, C) for name, rank in ranks.items()},
        "r_k": (widths.n_head, widths.head_size),
        **_matrices(widths, ("receptance", "key", "value")),
    }


def _channel_mix_of_rwkv7(widths: ModelDims) -> Shapes:
    C, F = widths.embd, widths.ffn
    return {"x_k": (1, 1, C), "key.weight": (F, C), "value.weight": (C, F)}


def _recognises_rwkv7(shapes: Shapes) -> bool:
    return _ATT + "r_k" in shapes


def _ranks_of_rwkv7(shapes: Shapes) -> dict[str, int | bool | None]:
    v1 = shapes.get("blocks.1.att.v1", shapes.get(_ATT + "v1"))
    return {
        "decay_lora_rank": shapes[_ATT + "w1"][1],
        "a_lora_rank": shapes[_ATT + "a1"][1],
        "v_lora_rank": None if v1 is None else v1[1],
        "gate_lora_rank": shapes[_ATT + "g1"][1],
        "block0_value_residual": _ATT + "v1" in shapes,
    }


def _group_of_rwkv7(name: str, is_matrix: bool) -> tuple[float, bool]:
    """RWKV-LM's RWKV-v7/train_temp/src/model.py."""
    return (2.0, False) if "att.w0" in name else (1.0, is_matrix)


_ROWS = (
    Version(
        name="x052",
        title="5.2",
        module="rwkv_cluster.model.versions.rwkv5",
        operator="wkv5",
        state_is_key_value=True,
        ffn_width=_ffn_of_rwkv5,
        default_ranks=_no_ranks,
        time_mix=_time_mix_of_rwkv5,
        channel_mix=_channel_mix_of_rwkv5,
        per_head="time_faaaa",
        recognises=_recognises_rwkv5,
        ranks_of=_no_ranks,
        optimizer_group=_group_of_rwkv5,
        saved=SavedTensors(
            of_width=10,
            of_attention=6,
            of_attention_plain=3,
            of_width_trained=6,
            of_attention_trained=1,
            of_width_trained_plain=1,
            of_width_trained_in_block_0=3,
        ),
        passes=Passes(forward=70, training=221, launches_forward=62, launches=177),
        passes_native=Passes(forward=25, training=58, launches_forward=33, launches=79),
        passes_wide=Passes(forward=31, training=74, launches_forward=41, launches=95),
    ),
    Version(
        name="x060",
        title="6",
        module="rwkv_cluster.model.versions.rwkv6",
        operator="wkv6",
        state_is_key_value=True,
        ffn_width=_ffn_of_rwkv5,
        default_ranks=_default_ranks_of_rwkv6,
        time_mix=_time_mix_of_rwkv6,
        channel_mix=_channel_mix_of_rwkv6,
        per_head="time_faaaa",
        recognises=_recognises_rwkv6,
        ranks_of=_ranks_of_rwkv6,
        optimizer_group=_group_of_rwkv5,
        saved=SavedTensors(
            of_width=18,
            of_attention=7,
            of_attention_plain=3,
            of_width_trained=8,
            of_attention_trained=1,
            of_width_trained_plain=1,
            of_width_trained_in_block_0=10,
        ),
        passes=Passes(forward=96, training=300, launches_forward=79, launches=227),
        passes_native=Passes(forward=35, training=85, launches_forward=40, launches=102),
        passes_wide=Passes(forward=40, training=102, launches_forward=48, launches=119),
        loras=(("time_maa_w1", "time_maa_w2"), ("time_decay_w1", "time_decay_w2")),
    ),
    Version(
        name="x070",
        title="7",
        module="rwkv_cluster.model.versions.rwkv7",
        operator="wkv7",
        ffn_width=_ffn_of_rwkv7,
        default_ranks=_default_ranks_of_rwkv7,
        time_mix=_time_mix_of_rwkv7,
        channel_mix=_channel_mix_of_rwkv7,
        per_head="r_k",
        recognises=_recognises_rwkv7,
        ranks_of=_ranks_of_rwkv7,
        optimizer_group=_group_of_rwkv7,
        # plain: kappa's norm and the reading; block 0 defines v_first and interpolates nothing
        saved=SavedTensors(
            of_width=22,
            of_width_plain=6,
            of_width_not_in_block_0=2,
            carried=1,
            of_width_trained=8,
            of_width_trained_plain=4,
            of_width_trained_in_block_0=1,
        ),
        passes=Passes(forward=110, training=392, launches_forward=92, launches=285),
        passes_native=Passes(forward=36, training=89, launches_forward=37, launches=91),
        passes_wide=Passes(forward=42, training=104, launches_forward=45, launches=107),
        loras=(("w1", "w2"), ("a1", "a2"), ("v1", "v2"), ("g1", "g2")),
        unused_in_block_0=("v0", "v1", "v2"),
    ),
)
VERSIONS: dict[str, Version] = {version.name: version for version in _ROWS}
"""The rows by `model_type`, from the oldest version to the newest."""
