"""The fastest setting of a run that fits a GPU: micro batch, grad_cp, ZeRO stage and offloading are tried out.

Its memory is that of `train.memory`, its time that of `planning.step_time` and `planning.transfers`. The global batch
stays. The head and the loss are computed in chunks in every setting. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from rwkv_cluster.config import Config
from rwkv_cluster.config.loader import nested, yaml_lines, yaml_value
from rwkv_cluster.config.schema import ranks_per_node
from rwkv_cluster.config.yaml_reader import parse_scalar
from rwkv_cluster.data.batch_size import divisors
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.planning.formatting import sharding_name
from rwkv_cluster.planning.options import Assumptions
from rwkv_cluster.planning.recommend import shardings
from rwkv_cluster.planning.run_plan import Row, RunPlan, plan_run
from rwkv_cluster.planning.step_time import step_time
from rwkv_cluster.planning.transfers import transfer_seconds
from rwkv_cluster.runtime.gpu_specs import GPUS, Gpu, find_gpu
from rwkv_cluster.train.memory.model_states import Sharding
from rwkv_cluster.train.memory.peak import Memory, MemoryModel, Setting, needed

AS_FAST = 1.01
"""Settings whose predicted times differ by less are taken for equally fast: the lower ZeRO stage is then better, and of
one stage what needs less memory."""
SHOWN = 6


@dataclass(frozen=True)
class Candidate:
    """A setting, its micro batches in a step, its memory on a rank, and its predicted seconds for a step."""

    setting: Setting
    accumulate: int
    memory: Memory
    seconds: float

    @property
    def name(self) -> str:
        """Setting in words."""
        setting = self.setting
        batch = f"micro_bsz {setting.micro_bsz} * {self.accumulate}"
        return f"{sharding_name(setting.sharding)}, {batch}, grad_cp {int(setting.grad_cp)}"


@dataclass(frozen=True)
class Fit:
    """What fits a GPU.

    plan: of the run with the winner's setting. candidates: the winner, then the best of every other sharding and
    grad_cp that fits, from the fastest to the slowest. changes: fields of `training` that the winner sets otherwise
    than the configuration. asked_batch: samples of a step that the configuration asks for.
    """

    gpu_name: str
    gpu: Gpu
    nodes: int
    plan: RunPlan
    candidates: Sequence[Candidate]
    changes: dict[str, Any]
    asked_batch: int

    @property
    def winner(self) -> Candidate:
        """The fastest."""
        return self.candidates[0]

    def text(self, placement: Mapping[str, Any]) -> str:
        """Table of the settings, and the winner's as lines of a file and as options. placement: fields before them."""
        run, ranks = self.plan.length, self.plan.assumptions.ranks
        where = f"{ranks} rank{'s' if ranks > 1 else ''} on {self.nodes} node{'s' if self.nodes > 1 else ''}"
        batch = f"{run.global_batch_size:,} samples, {run.tokens_per_step:,} tokens a step"
        lines = [f"{self.gpu_name}, {self.gpu.memory_gb:g} GB, {where}; {batch}"]
        if run.global_batch_size != self.asked_batch:
            lines.append(
                f"The global batch of {self.asked_batch:,} samples cannot be shared by {ranks:,} ranks: "
                f"{run.global_batch_size:,} is the nearest that can"
            )
        lines += ["", f"{'s a step':>10}{'tokens/s':>12}{'GB':>8}{'host GB':>9}  setting"]
        lines += [self._row(candidate) for candidate in self.candidates[:SHOWN]]
        lines += ["", "Times are predicted, not measured: docs/planning.md says how.", ""]
        fields = {**placement, **{f"training.{name}": value for name, value in self.changes.items()}}
        if not fields:
            return "\n".join([*lines, "The configuration has the fastest setting already."])
        in_file = [line for line, _ in yaml_lines(nested(fields), "", {}, 0)]
        options = " ".join(f"--{name}={yaml_value(value)}" for name, value in fields.items())
        return "\n".join([*lines, "The first in the file, and as options:", "", *in_file, "", options])

    def _row(self, candidate: Candidate) -> str:
        speed = self.plan.length.tokens_per_step / candidate.seconds
        memory = f"{needed(candidate.memory) / 1e9:8.1f}{candidate.memory.host / 1e9:9.1f}"
        return f"{candidate.seconds:10.3f}{speed:12,.0f}{memory}  {candidate.name}"

    def data(self) -> dict[str, Any]:
        """The same for JSON: seconds, bytes."""
        return {
            "gpu": self.gpu_name,
            "ranks": self.plan.assumptions.ranks,
            "nodes": self.nodes,
            "global_batch_size": self.plan.length.global_batch_size,
            "asked_batch_size": self.asked_batch,
            "training": self.changes,
            "settings": [self._candidate_data(candidate) for candidate in self.candidates],
        }

    def _candidate_data(self, candidate: Candidate) -> dict[str, Any]:
        sharding = candidate.setting.sharding
        return {
            "zero_stage": sharding.stage,
            "offload_optimizer": sharding.offload_optimizer,
            "offload_parameters": sharding.offload_parameters,
            "micro_bsz": candidate.setting.micro_bsz,
            "accumulate_grad_batches": candidate.accumulate,
            "grad_cp": int(candidate.setting.grad_cp),
            "seconds": candidate.seconds,
            "tokens_per_s": self.plan.length.tokens_per_step / candidate.seconds,
            "needed": needed(candidate.memory),
            "host": candidate.memory.host,
        }


def placement(config: Config, gpus: str | None, nodes: str | None) -> dict[str, Any]:
    """Fields that put the run of `config` on so many nodes with so many GPUs each, without those that say so already.

    gpus, nodes: as typed, None where nothing was said.
    """
    fields: dict[str, Any] = {} if nodes is None else {"launch.num_nodes": parse_scalar(nodes)}
    if gpus is not None:
        alone = config.launch.target == "local"
        fields |= {"launch.ranks_per_node": None, "launch.gpus_per_node": None if alone else parse_scalar(gpus)}
        fields |= {"training.devices": parse_scalar(gpus)} if alone else {}
    return {name: value for name, value in fields.items() if reduce(getattr, name.split("."), config) != value}


def fit(config: Config, gpu_name: str | None) -> Fit:
    """The fastest settings of `config`, on the nodes and ranks that it names, that fit the GPU of that name.

    Raises ConfigError where nothing fits, with what would, and for a run that cannot be planned.
    """
    if gpu_name is None:
        raise ConfigError("--fit needs the GPU's memory and rates", remedy="Give --gpu NAME")
    if config.training.accelerator == "cpu":
        raise ConfigError("--fit is for GPUs, and training.accelerator is cpu", remedy="Set it to auto or cuda")
    gpu, training, nodes = find_gpu(gpu_name), config.training, config.launch.num_nodes
    ranks = nodes * ranks_per_node(config)
    asked = training.global_batch_size or training.micro_bsz * ranks * (training.accumulate_grad_batches or 1)
    per_rank = max(1, round(asked / ranks))
    batch = {"micro_bsz": 1, "global_batch_size": per_rank * ranks, "accumulate_grad_batches": None, "grad_cp": 1}
    plan = plan_run(
        config.model_copy(update={"training": training.model_copy(update=batch)}),
        Assumptions(ranks, None, None, gpu.peak_tflops, gpu.memory_gb),
    )
    memory_model = _memory_model(plan)
    memories = [(setting, memory_model.memory(setting)) for setting in _settings(plan, per_rank)]
    fitting = [(setting, memory) for setting, memory in memories if needed(memory) <= gpu.memory_gb * 1e9]
    if not fitting:
        raise _nothing_fits(gpu_name, gpu, ranks, *min(memories, key=lambda pair: needed(pair[1])))
    candidates = [_candidate(plan, gpu, nodes, setting, memory) for setting, memory in fitting]
    ordered = _best_of_each(candidates)
    winner = ordered[0]
    return Fit(
        gpu_name=gpu_name,
        gpu=gpu,
        nodes=nodes,
        plan=_with_setting(plan, winner.setting, winner.memory),
        candidates=ordered,
        changes=_changes(config, winner.setting, per_rank * ranks),
        asked_batch=asked,
    )


def _memory_model(plan: RunPlan) -> MemoryModel:
    config = plan.config
    assert config.model.vocab_size is not None
    return MemoryModel(config.model, config.model.vocab_size, config.training, plan.kernels, config.adapter)


def _settings(plan: RunPlan, per_rank: int) -> Iterator[Setting]:
    """Every setting with that many samples of a rank in a step. Alone, a rank has nobody to share with but its host."""
    ranks = plan.assumptions.ranks
    for sharding in shardings(ranks, plan.config.training):
        if sharding.stage is not None and ranks == 1 and not sharding.offload_optimizer:
            continue
        for micro_bsz in divisors(per_rank):
            for grad_cp in (False, True):
                yield Setting(sharding, grad_cp, micro_bsz, accumulates=micro_bsz < per_rank)


def _with_setting(plan: RunPlan, setting: Setting, memory: Memory) -> RunPlan:
    accumulate = plan.length.global_batch_size // (setting.micro_bsz * setting.sharding.ranks)
    row = Row(setting, memory, is_configured=True, fits=True)
    return replace(plan, rows=[row], length=replace(plan.length, accumulate=accumulate))


def _candidate(plan: RunPlan, gpu: Gpu, nodes: int, setting: Setting, memory: Memory) -> Candidate:
    plan = _with_setting(plan, setting, memory)
    seconds = step_time(plan, gpu).total + transfer_seconds(plan, gpu, nodes)
    return Candidate(setting, plan.length.accumulate, memory, seconds)


def _best_of_each(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best candidate of each sharding and grad_cp, and the best of these first."""
    groups: dict[tuple[Sharding, bool], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault((candidate.setting.sharding, candidate.setting.grad_cp), []).append(candidate)
    best = sorted(map(_least_memory, groups.values()), key=lambda candidate: candidate.seconds)
    as_fast = [candidate for candidate in best if candidate.seconds <= AS_FAST * best[0].seconds]
    winner = min(as_fast, key=lambda candidate: (candidate.setting.sharding.stage or 0, needed(candidate.memory)))
    return [winner, *(candidate for candidate in best if candidate is not winner)]


def _least_memory(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate that needs least of those that are as fast as the fastest."""
    fastest = min(candidate.seconds for candidate in candidates)
    as_fast = (candidate for candidate in candidates if candidate.seconds <= AS_FAST * fastest)
    return min(as_fast, key=lambda candidate: needed(candidate.memory))


def _changes(config: Config, setting: Setting, global_batch_size: int) -> dict[str, Any]:
    """Fields of `training` that say `setting`, without those that say so already."""
    training, sharding = config.training, setting.sharding
    fields: dict[str, Any] = {"micro_bsz": setting.micro_bsz, "global_batch_size": global_batch_size}
    fields |= {"accumulate_grad_batches": None, "grad_cp": int(setting.grad_cp)}
    if sharding != Sharding.of(training, sharding.ranks):
        fields |= {"strategy": "auto", "zero_stage": sharding.stage}
        fields |= {name: getattr(sharding, name) for name in ("offload_optimizer", "offload_parameters")}
    return {name: value for name, value in fields.items() if getattr(training, name) != value}


def _nothing_fits(gpu_name: str, gpu: Gpu, ranks: int, setting: Setting, memory: Memory) -> ConfigError:
    """The error that no setting fits, which says what the smallest needs and which GPUs have it."""
    bytes_needed = needed(memory)
    larger = sorted((known.memory_gb, name) for name, known in GPUS.items() if known.memory_gb * 1e9 >= bytes_needed)
    names = ", ".join(name for _, name in larger[:3])
    smallest = f"{sharding_name(setting.sharding)}, micro_bsz {setting.micro_bsz}, grad_cp {int(setting.grad_cp)}"
    ways = "more GPUs, a shorter model.ctx_len, an adapter or a smaller model"
    return ConfigError(
        f"no setting of this run fits {gpu_name} ({gpu.memory_gb:g} GB) on {ranks} rank{'s' if ranks > 1 else ''}: the "
        f"smallest ({smallest}) needs {bytes_needed / 1e9:.1f} GB",
        remedy=f"It would fit {names}; or use {ways}" if names else f"Use {ways}",
    )
