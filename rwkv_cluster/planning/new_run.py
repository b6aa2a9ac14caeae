"""A file for a new run: what a task needs, on the GPUs at hand, with the reason for every choice.

The values of a task are those of its recipe; micro batch, grad_cp, ZeRO and offloading are what `planning.fit` finds.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from rwkv_cluster.config import Config
from rwkv_cluster.config.loader import DEFAULT, nested, parse_config, yaml_lines
from rwkv_cluster.config.shipped import shipped_file, shipped_recipes
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.planning.fit import Fit, fit
from rwkv_cluster.tokenizer import WORLD_ROWS
from rwkv_cluster.train.memory.peak import needed

RECIPES = {
    "sft": "sft-g1.yaml",
    "lora": "tasks/lora.yaml",
    "state": "state-g1.yaml",
    "continue": "tasks/continue.yaml",
    "pretrain": "tasks/pretrain.yaml",
}
"""The recipe of each task."""

BYTE_ROWS = 257
PRETRAIN_SAMPLES = 128
TOKENS_PER_PARAMETER = 20
SHARE_OF_TIME = 0.5
"""Of the time that is given, which the predicted steps may take: they are predicted, and not measured."""

_WHY = {
    "work_dir": "Everything that the run makes is in here; the same command continues it.",
    "model.ctx_len": "Tokens of a sample: more cost memory, and time in proportion.",
    "data.inputs": "What is trained on.",
    "data.format": "Each row is a conversation.",
    "data.template": "The text in which RWKV-7's G1 models know conversations.",
    "data.train_on": "Questions are read and not trained on.",
    "data.tokenizer.type": "The vocabulary of the weights.",
    "data.tokenizer.path": "It lies beside the weights.",
    "data.validation_fraction": "Documents held out, on which overfitting shows.",
    "data.n_epochs_duplication": "Each document is written once; num_epochs says how often it is read.",
    "data.write_jsonl": "No second copy of the text.",
    "training.precision": "Half the memory of fp32 for activations; masters and moments are fp32 all the same.",
    "training.init_from": "Layers, width and LoRA ranks are read from it.",
    "training.micro_bsz": "Samples of a GPU at a time: the fastest that fits, by `plan --fit`.",
    "training.zero_stage": "Shards what a GPU alone cannot hold, or what is sent anyway.",
    "training.lr_init": "Within the rates in use for this task.",
    "training.lr_final": "The rate falls to this along a cosine.",
    "training.warmup_steps": "Adam's moments are of few steps at first.",
    "training.num_epochs": "Passes over the data; watch the validation loss for overfitting.",
    "training.devices": "Processes on this machine, one for each GPU.",
    "adapter.kind": "The weights stay as they are, which saves their gradients and moments.",
    "adapter.rank": "Larger ranks learn more and need more memory.",
    "launch.target": "Several machines: a job of Slurm; other targets are in docs/clusters.md.",
    "launch.num_nodes": "Machines.",
    "launch.gpus_per_node": "One rank for each.",
    "launch.time": "The job's limit; it is queued again until the run ends.",
}


@dataclass(frozen=True)
class Choice:
    """What a user says of a new run.

    base: path of weights, and for task pretrain a released size such as 0.4b. gpus: on each node. time_s: limit in
    seconds, None without one. work_dir: of the run.
    """

    task: str
    base: str
    data: str
    gpu: str
    nodes: int
    gpus: int
    time_s: int | None
    work_dir: str


def released_sizes() -> list[str]:
    """Names of the released sizes, from the smallest."""
    names = [name for name in shipped_recipes() if name.startswith("sizes/")]
    return sorted((Path(name).stem for name in names), key=lambda size: float(size.removesuffix("b")))


def new_run(choice: Choice) -> tuple[str, Fit]:
    """Text of the file and what was found to fit. Raises ConfigError where nothing fits, or a choice cannot be."""
    if choice.task not in RECIPES:
        raise ConfigError(f"--task is {choice.task!r:.40}", remedy=f"Use {', '.join(RECIPES)}")
    fields: dict[str, Any] = {
        "work_dir": choice.work_dir,
        **_of_recipe(RECIPES[choice.task]),
        **_of_base(choice),
        **_place(choice),
    }
    fields["data.inputs"] = [choice.data]
    found = fit(_config(fields, choice), choice.gpu)
    setting = found.winner.setting
    fields |= {"training.micro_bsz": setting.micro_bsz, "training.grad_cp": int(setting.grad_cp)}
    fields["training.global_batch_size"] = found.plan.length.global_batch_size
    if setting.sharding.stage is not None:
        fields["training.zero_stage"] = setting.sharding.stage
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(setting.sharding, name):
            fields[f"training.{name}"] = True
    if choice.time_s is not None:
        fields["training.max_tokens"] = _tokens_in_time(choice.time_s, found, fields.get("training.max_tokens"))
    _config(fields, choice)
    return _text(fields, choice, found), found


def _of_recipe(name: str) -> dict[str, Any]:
    """Fields that a recipe sets, with dotted names."""
    resolved = parse_config(shipped_file(name), name)
    names = [field for field, source in resolved.sources.items() if source != DEFAULT and field != "work_dir"]
    return {field: reduce(getattr, field.split("."), resolved.config) for field in names}


def _of_base(choice: Choice) -> dict[str, Any]:
    """Fields that follow from the weights, or from the size. Raises CheckpointError for a file of no weights."""
    if choice.task == "pretrain":
        if choice.base not in released_sizes():
            raise ConfigError(
                f"--base is {choice.base!r:.80}, and pretrain begins from nothing",
                remedy=f"Name a released size: {', '.join(released_sizes())}",
            )
        size = _of_recipe(f"sizes/{choice.base}.yaml")
        width, parameters = size["model.n_embd"], float(choice.base.removesuffix("b")) * 1e9
        return size | {
            "training.global_batch_size": PRETRAIN_SAMPLES,
            "training.lr_init": float(f"{0.45 / width:.1e}"),
            "training.lr_final": float(f"{0.04 / width:.1e}"),
            "training.max_tokens": round(TOKENS_PER_PARAMETER * parameters),
        }
    from rwkv_cluster.interchange.read import peek_weights  # loads torch
    from rwkv_cluster.model.weights_file import infer_model_config

    rows = infer_model_config(peek_weights(Path(choice.base)).tensors).vocab_size
    return {"training.init_from": choice.base, **_tokenizer(Path(choice.base), rows)}


def _tokenizer(base: Path, rows: int | None) -> dict[str, Any]:
    """The tokenizer of weights, by their number of rows, or by the file beside them."""
    beside = base / "tokenizer.json"
    if rows == WORLD_ROWS:
        return {"data.tokenizer.type": "world"}
    if beside.is_file():
        return {"data.tokenizer.type": "hf", "data.tokenizer.path": str(beside)}
    if rows == BYTE_ROWS:
        return {"data.tokenizer.type": "byte"}
    raise ConfigError(
        f"{base} has {rows:,} rows, which is not the World vocabulary, and no tokenizer.json is beside it",
        remedy="Begin with a recipe of the task, and name the tokenizer in data.tokenizer",
    )


def _place(choice: Choice) -> dict[str, Any]:
    """Fields that say where the run is."""
    if choice.nodes == 1:
        return {"training.devices": choice.gpus} if choice.gpus > 1 else {}
    place = {"launch.target": "sbatch", "launch.num_nodes": choice.nodes, "launch.gpus_per_node": choice.gpus}
    return place | ({"launch.time": _slurm_time(choice.time_s)} if choice.time_s else {})


def _slurm_time(seconds: int) -> str:
    minutes = -(-seconds // 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"


def _tokens_in_time(seconds: int, found: Fit, most: int | None) -> int:
    """Tokens of whole steps that are predicted to take SHARE_OF_TIME of `seconds`, and no more than `most`."""
    per_step = found.plan.length.tokens_per_step
    steps = max(1, int(SHARE_OF_TIME * seconds / found.winner.seconds))
    return min(steps * per_step, most or steps * per_step)


def _config(fields: Mapping[str, Any], choice: Choice) -> Config:
    text = "\n".join(line for line, _ in yaml_lines(nested(fields), "", {}, 0))
    return parse_config(text.encode(), f"a new run of {choice.task}").config


def _text(fields: dict[str, Any], choice: Choice, found: Fit) -> str:
    """The file, with a sentence why above the fields."""
    winner, verb = found.winner, "launch" if choice.nodes > 1 else "train"
    speed = found.plan.length.tokens_per_step / winner.seconds
    title = (
        f"{choice.task} of {choice.base} on {choice.nodes * choice.gpus} * {found.gpu_name}, by rwkv-cluster new. "
        f"Predicted: {needed(winner.memory) / 1e9:.1f} of {found.gpu.memory_gb:g} GB of a GPU, {speed:,.0f} tokens/s, "
        f"{winner.seconds:.3g} s a step. `rwkv-cluster plan` says what else it needs, `rwkv-cluster {verb}` begins it."
    )
    why = _reasons(fields, choice, found)
    lines = [*_comment(title, ""), *_written(fields, why)]
    return "\n".join(lines) + "\n"


def _written(fields: dict[str, Any], why: Mapping[str, str]) -> list[str]:
    """Lines of the fields, each below its reason, and those in a row that share it below one."""
    order = {"work_dir": 0, "model": 1, "data": 2, "training": 3, "adapter": 4, "launch": 5}
    ordered = dict(sorted(fields.items(), key=lambda item: order[item[0].partition(".")[0]]))
    lines: list[str] = []
    said = ""
    for line, reason in yaml_lines(nested(ordered), "", why, 0):
        if not line.startswith(" ") and line.endswith(":"):
            lines.append("")
        indent = line[: len(line) - len(line.lstrip())]
        lines += [*_comment(reason, indent), line] if reason and reason != said else [line]
        said = reason
    return lines


def _comment(sentence: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(sentence, 118 - len(indent))]


def _reasons(fields: Mapping[str, Any], choice: Choice, found: Fit) -> dict[str, str]:
    """A sentence for every field that is set."""
    setting, memory = found.winner.setting, found.winner.memory
    kept = "Activations are kept, which is fastest, because they fit."
    again = "Activations are computed anew in the backward pass: kept, they would not fit, or only in smaller batches."
    asked, batch = found.asked_batch, fields["training.global_batch_size"]
    shared = f" {asked} cannot be shared by {choice.nodes * choice.gpus} ranks." if asked != batch else ""
    reasons = _WHY | {
        "training.grad_cp": again if setting.grad_cp else kept,
        "training.global_batch_size": f"Samples of a step over all GPUs, whatever their number.{shared}",
        "training.offload_optimizer": f"Masters and moments in the host, {memory.host / 1e9:.1f} GB for each GPU.",
        "training.offload_parameters": "The weights too, which are larger than the GPU.",
        "training.max_tokens": "The end of the run.",
    }
    if choice.time_s is not None:
        reasons["training.max_tokens"] = (
            f"{SHARE_OF_TIME:.0%} of the given time, at the predicted speed; num_epochs may end it before."
        )
    elif choice.task == "pretrain":
        reasons["training.max_tokens"] = f"{TOKENS_PER_PARAMETER} for each parameter; more is usual."
        reasons["training.lr_init"] = "0.45 / n_embd, as RWKV's documentation has it for pretraining."
    sizes = {name: f"Of the released size {choice.base}." for name in fields if name.startswith("model.")}
    return sizes | reasons
