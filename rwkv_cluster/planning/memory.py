"""Peak memory of a rank: which of an optimizer step's moments needs most, and what is held at it.

    head       the forward pass is through: everything is saved, and the loss has its logits
    backward   at the last block everything is still saved, and gradients begin; at the first, all gradients are there
    update     gradients, and under ZeRO their fp32 copy, beside masters and moments

Not in it: the CUDA context, cuBLAS, NCCL and the allocator's fragments; see `fit.ALLOWANCE`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_cluster.config import ModelConfig, TrainingConfig
from rwkv_cluster.model.parameter_shapes import Shapes, count, parameter_shapes
from rwkv_cluster.planning.activations import Activations, Kernels, activations
from rwkv_cluster.planning.model_states import ModelStates, Sharding, model_states


@dataclass(frozen=True)
class Setting:
    """What decides the memory of a rank, beside the model. accumulates: a step has several micro batches."""

    sharding: Sharding
    grad_cp: bool
    micro_bsz: int
    accumulates: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. activations: the most that is saved at a time. peak: on the device. host: offloaded."""

    states: ModelStates
    activations: float
    head: float
    peak: float
    peak_at: str
    host: float


@dataclass(frozen=True)
class MemoryModel:
    """A model and what trains it: everything but the setting."""

    model: ModelConfig
    vocab_size: int
    training: TrainingConfig
    kernels: Kernels

    @property
    def shapes(self) -> Shapes:
        return parameter_shapes(self.model, self.vocab_size)

    def memory(self, setting: Setting) -> Memory:
        """Of a rank under `setting`."""
        precision, stage = self.training.precision, setting.sharding.stage
        states = model_states(self.shapes, setting.sharding, precision, self.training.ds_bucket_mb * 1_000_000)
        kept = activations(
            self.model,
            self.vocab_size,
            self.kernels,
            micro_bsz=setting.micro_bsz,
            precision=precision,
            bf16_parameters=bool(stage) and precision != "fp32",
        )
        moments = self._moments(states, kept, setting)
        at = max(moments, key=lambda name: moments[name])
        saved = kept.saved(grad_cp=setting.grad_cp) + (kept.one_block if setting.grad_cp else 0)
        return Memory(states, saved, max(kept.head, kept.head_backward), moments[at], at, states.host)

    def _moments(self, states: ModelStates, kept: Activations, setting: Setting) -> dict[str, float]:
        standing = states.weights + states.masters + states.moments
        gradients, communicating = states.gradients, states.buckets + states.gathered
        total = count(self.shapes)
        matrix = gradients * self.vocab_size * self.model.n_embd / total  # of the head, and of emb
        in_a_block = gradients * count({n: s for n, s in self.shapes.items() if n.startswith("blocks.0.")}) / total
        early = gradients if states.keeps_gradients or setting.accumulates else 0.0
        saved, again = kept.saved(grad_cp=setting.grad_cp), kept.one_block if setting.grad_cp else 0.0
        last_block = kept.outside + kept.one_block + kept.workspace
        return {
            "head": standing + communicating + early + saved + max(kept.head, kept.head_backward),
            "backward, last block": standing + communicating + max(early, matrix) + saved + again + kept.workspace,
            "backward, first block": standing
            + communicating
            + max(early, gradients - matrix - in_a_block)
            + last_block,
            "update": standing + gradients + states.gradient_copy + (states.gathered and states.buckets),
        }
