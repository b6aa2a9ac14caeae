"""Which tokens a step trains on: a pure function of the step, the same for every split into ranks.

RWKV-LM's order (`src/dataset.py`): the token file is cut into slots of `ctx_len` tokens; with a prime p ≡ 2 (mod 3)
the map j -> κ j³ mod p is a bijection of the residues, so samples j = 1 … p visit every slot once, in an order
that looks random and needs no state. Sample numbers run on over epochs, ranks and restarts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rwkv_cluster.errors import DataError

_MILLER_RABIN_BASES = (
    2,
    3,
    5,
    7,
    11,
    13,
    17,
    19,
    23,
    29,
    31,
    37,
)  # exact below 3.3e24 (Sorenson and Webster 2015)


def is_prime(number: int) -> bool:
    """Whether `number` is prime. Deterministic for every token count that can exist."""
    if number < 2:
        return False
    for base in _MILLER_RABIN_BASES:
        if number % base == 0:
            return number == base
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return not any(_is_witness(base, number, odd, twos) for base in _MILLER_RABIN_BASES)


def _is_witness(base: int, number: int, odd: int, twos: int) -> bool:
    power = pow(base, odd, number)
    if power in (1, number - 1):
        return False
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return False
    return True


def largest_magic_prime(n_tokens: int, ctx_len: int) -> int | None:
    """Largest prime p ≡ 2 (mod 3) with p <= n_tokens div ctx_len - 1, or None when there is none.

    The -1 leaves the one token that the last slot's targets reach beyond it.
    """
    for candidate in range(n_tokens // ctx_len - 1, 1, -1):
        if candidate % 3 == 2 and is_prime(candidate):
            return candidate
    return None


def require_magic_prime(n_tokens: int, ctx_len: int) -> int:
    """`largest_magic_prime`, or a DataError that says how many tokens and which ctx_len would do."""
    prime = largest_magic_prime(n_tokens, ctx_len)
    if prime is None:
        needed = 3 * ctx_len
        remedy = f"a model.ctx_len of at most {n_tokens // 3}" if n_tokens >= 3 else "at least 3 tokens"
        raise DataError(
            f"the prepared data has {n_tokens} tokens, too few for ctx_len {ctx_len}: {needed} are needed",
            remedy=f"Add data, or use {remedy}",
        )
    return prime


@dataclass(frozen=True)
class SamplePlan:
    """Step -> token offsets, for one token file, context length and global batch.

    ctx_len: T, tokens in a sample. magic_prime: p. global_batch_size: samples in an optimizer step over all ranks.
    skipped: batches that no step trains on, as [first, end), apart and ascending; a rollback adds to them.
    """

    ctx_len: int
    magic_prime: int
    global_batch_size: int
    skipped: tuple[tuple[int, int], ...] = ()

    @property
    def multiplier(self) -> int:
        """κ = floor(p (√5 - 1) / 2), the golden factor evaluated first in float64, as RWKV-LM does."""
        return int(self.magic_prime * ((math.sqrt(5) - 1) / 2))

    @property
    def tokens_per_step(self) -> int:
        return self.ctx_len * self.global_batch_size

    def offset(self, sample: int) -> int:
        """First token of sample number `sample` (from 1). Exact: Python integers do not overflow."""
        return self.multiplier * sample**3 % self.magic_prime * self.ctx_len

    def batch(self, step: int) -> int:
        """Number of the batch that optimizer step `step` trains on, both from 0: the same but for skipped ones."""
        for first, end in self.skipped:
            if first > step:
                break
            step += end - first
        return step

    def without(self, first_step: int, last_step: int) -> SamplePlan:
        """The plan in which no step trains on the batches that steps `first_step` to `last_step` have here.

        Steps before `first_step` keep theirs.
        """
        skipped = sorted([*self.skipped, (self.batch(first_step), self.batch(last_step) + 1)])
        merged = [skipped[0]]
        for first, end in skipped[1:]:
            if first <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((first, end))
        return replace(self, skipped=tuple(merged))

    def samples(self, step: int) -> range:
        """Sample numbers of optimizer step `step` (from 0), in order, over all ranks and micro batches."""
        first = 1 + self.batch(step) * self.global_batch_size
        return range(first, first + self.global_batch_size)

    def rank_samples(self, step: int, *, rank: int, world_size: int, micro_bsz: int) -> list[list[int]]:
        """The micro batches of one rank at one step: lists of `micro_bsz` sample numbers.

        Interleaved as in RWKV-LM (sample number = first + index * world_size + rank), so that the ranks' lists
        together are `samples(step)` for every split.
        """
        mine = self.samples(step)[rank::world_size]
        return [list(mine[start : start + micro_bsz]) for start in range(0, len(mine), micro_bsz)]
