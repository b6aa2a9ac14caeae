"""Peak memory of a rank: which phase of an optimizer step needs most, and what is held in it.

    head          the forward pass is through: everything is saved, and the loss has its logits
    last block    its backward pass: everything is still saved, and gradients begin
    first block   its backward pass: nearly all gradients are there
    update        gradients, and under ZeRO their fp32 copy, beside masters and moments

Not in it: the CUDA context, cuBLAS, NCCL and the allocator's fragments; see `needed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

from rwkv_cluster.config import AdapterConfig, ModelConfig, TrainingConfig
from rwkv_cluster.model.parameter_shapes import count
from rwkv_cluster.model.versions.table import version_of
from rwkv_cluster.train.memory.activations import Activations, Kernels, activations
from rwkv_cluster.train.memory.model_states import ITEM_BYTES, ModelStates, Sharding, keeps_copies, model_states
from rwkv_cluster.train.optimizers.selection import RunParameters, run_parameters
from rwkv_cluster.train.optimizers.table import copied_matrices, optimizer_of


@dataclass(frozen=True)
class Setting:
    """Settings that decide the memory of a rank. accumulates: a step has several micro batches."""

    sharding: Sharding
    grad_cp: bool
    micro_bsz: int
    accumulates: bool = False

    def without_grad_cp(self) -> Setting:
        """The same, with all activations kept."""
        return replace(self, grad_cp=False)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. activations: the most saved at a time. peak: on the device, in phase peak_at. host: moved."""

    states: ModelStates
    activations: float
    head: float
    peak: float
    peak_at: str
    host: float


ALLOWANCE = 1.05, 1e9
"""Factor for the allocator's fragments, and bytes for the CUDA context, cuBLAS and NCCL, beside a peak. Assumed."""


def needed(memory: Memory) -> float:
    """Bytes of a GPU for a rank with that peak."""
    factor, context = ALLOWANCE
    return factor * memory.peak + context


@dataclass(frozen=True)
class MemoryModel:
    """A model and what trains it: everything but the setting."""

    model: ModelConfig
    vocab_size: int
    training: TrainingConfig
    kernels: Kernels
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    @cached_property
    def parameters(self) -> RunParameters:
        """Shapes of the parameters, trained and frozen."""
        return run_parameters(self.model, self.vocab_size, self.training, self.adapter)

    @cached_property
    def _states(self) -> Callable[[Sharding], ModelStates]:
        """Model states by sharding, of which there are few while settings are many."""
        precision, bucket_elements = self.training.precision, self.training.ds_bucket_mb * 1_000_000
        optimizer, shapes = optimizer_of(self.training), self.parameters.in_memory
        chosen, quant = self.parameters.trained if self.parameters.is_partial else None, self.parameters.quant
        return cache(
            lambda sharding: model_states(shapes, sharding, precision, bucket_elements, optimizer, chosen, quant)
        )

    @cached_property
    def _shares(self) -> tuple[float, float, float]:
        """Shares of the gradients that are those of emb, of the first block and of head."""
        parameters = self.parameters
        shapes = parameters.trained if parameters.is_partial else parameters.model
        total = count(shapes)
        parts = ("emb.", "blocks.0.", "head.")
        emb, first, head = (
            count({name: shape for name, shape in shapes.items() if name.startswith(part)}) / total for part in parts
        )
        return emb, first, head

    def memory(self, setting: Setting) -> Memory:
        """Memory of one rank under `setting`."""
        precision, stage = self.training.precision, setting.sharding.stage
        states = self._states(setting.sharding)
        activation_bytes = activations(
            self.model,
            self.vocab_size,
            self.kernels,
            micro_bsz=setting.micro_bsz,
            precision=precision,
            bf16_parameters=bool(stage) and precision != "fp32",
            parameters=self.parameters if self.parameters.is_partial else None,
        )
        if keeps_copies(precision, stage, accumulates=setting.accumulates, grad_cp=setting.grad_cp):
            item, trained = ITEM_BYTES[precision], self.parameters.trained
            in_blocks = float(item * copied_matrices(trained, version_of(self.model).loras))
            of_head = float(item * count({name: shape for name, shape in trained.items() if name == "head.weight"}))
            states = replace(states, weights=states.weights + in_blocks + of_head)
            activation_bytes = replace(
                activation_bytes, weights=activation_bytes.weights - in_blocks, head=activation_bytes.head - of_head
            )
        phases = self._phases(states, activation_bytes, setting)
        at = max(phases, key=lambda name: phases[name])
        saved = activation_bytes.saved(grad_cp=setting.grad_cp) + (activation_bytes.one_block if setting.grad_cp else 0)
        return Memory(
            states, saved, max(activation_bytes.head, activation_bytes.head_backward), phases[at], at, states.host
        )

    def _phases(self, states: ModelStates, activation_bytes: Activations, setting: Setting) -> dict[str, float]:
        """Bytes on the device in each phase of an optimizer step."""
        gradients = states.gradients
        of_emb, of_block_0, of_head = (gradients * share for share in self._shares)
        before_block_0 = gradients - of_emb - of_block_0
        early = gradients if states.keeps_gradients or setting.accumulates else 0.0
        saved, again = (
            activation_bytes.saved(grad_cp=setting.grad_cp),
            activation_bytes.one_block if setting.grad_cp else 0.0,
        )
        standing = states.weights + states.masters + states.moments
        passing = standing + states.buckets + states.gathered
        updating = standing + (states.buckets if states.keeps_gradients else 0.0)
        return {
            "head": passing + early + saved + max(activation_bytes.head, activation_bytes.head_backward),
            "last block": passing + max(early, of_head) + saved + again + activation_bytes.workspace,
            "first block": passing
            + max(early, before_block_0)
            + activation_bytes.outside
            + activation_bytes.one_block
            + activation_bytes.workspace,
            "update": updating + gradients + states.gradient_copy,
        }
