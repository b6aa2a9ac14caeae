"""The choice that `training.grad_cp: auto` leaves: keep the blocks' activations, or compute them anew.

Keeping them saves a forward pass of the blocks in every step. They are kept where the predicted peak of a rank
(`train.memory.peak`) takes no more than SHARE of the memory that it has.
"""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_cluster.config import Config
from rwkv_cluster.train.memory.peak import MemoryModel, Setting, needed

SHARE = 0.9
"""Of a rank's memory that a setting may need. The rest is for what the prediction misses."""


@dataclass(frozen=True)
class GradCpChoice:
    """grad_cp: the value chosen. needed: bytes predicted without it. available: bytes of the rank."""

    grad_cp: int
    needed: float
    available: float

    def __str__(self) -> str:
        verdict = "more than" if self.grad_cp else "within"
        return (
            f"training.grad_cp auto is {self.grad_cp}: keeping all activations is predicted to need "
            f"{self.needed / 1e9:.1f} GB, {verdict} {SHARE:.0%} of {self.available / 1e9:.1f} GB"
        )


def choose_grad_cp(memory_model: MemoryModel, setting: Setting, available: float) -> GradCpChoice:
    """The value for a rank with `available` bytes of memory. setting: with any grad_cp."""
    bytes_needed = needed(memory_model.memory(setting.without_grad_cp()))
    return GradCpChoice(int(bytes_needed > SHARE * available), bytes_needed, available)


def with_grad_cp(config: Config, grad_cp: int) -> Config:
    """`config` with a value of training.grad_cp."""
    return config.model_copy(update={"training": config.training.model_copy(update={"grad_cp": grad_cp})})
