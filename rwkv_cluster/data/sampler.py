"""Which tokens a step trains on: a pure function of the step, the same for every split into ranks.

Windows are what samples are read from: stretches of `ctx_len` tokens of the token file, or whole documents packed into
as many positions (`data.windows`). An order maps sample numbers, which run on over epochs, ranks and restarts, to
windows, and needs no state:

rwkv-lm  RWKV-LM's (`src/dataset.py`): with a prime p ≡ 2 (mod 3) the map j -> κ j³ mod p is a bijection of the
         residues, so samples j = 1 … p visit each of the first p windows once, in an order that looks random. Up to a
         third of a small file lies beyond p.
all      every window once in an epoch, each epoch shuffled anew by the seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from rwkv_cluster.config import DataConfig
from rwkv_cluster.data.manifest import DataManifest
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
    return _largest_prime_up_to(n_tokens // ctx_len - 1)


def _largest_prime_up_to(most: int) -> int | None:
    """Largest prime p ≡ 2 (mod 3), or None when there is none."""
    for candidate in range(most, 1, -1):
        if candidate % 3 == 2 and is_prime(candidate):
            return candidate
    return None


def require_magic_prime(n_tokens: int, ctx_len: int) -> int:
    """`largest_magic_prime`, or a DataError that says how many tokens and which ctx_len would do."""
    prime = largest_magic_prime(n_tokens, ctx_len)
    if prime is None:
        needed = 3 * ctx_len
        remedy = f"a model.ctx_len of at most {n_tokens // 3}" if n_tokens >= 3 else "at least 3 tokens"
        every = ", or data.order=all" if n_tokens > ctx_len else ""
        raise DataError(
            f"the prepared data has {n_tokens} tokens, too few for ctx_len {ctx_len}: {needed} are needed",
            remedy=f"Add data, or use {remedy}{every}",
        )
    return prime


@dataclass(frozen=True)
class CubicOrder:
    """RWKV-LM's order of the first `magic_prime` windows."""

    magic_prime: int

    @property
    def multiplier(self) -> int:
        """κ = floor(p (√5 - 1) / 2), the golden factor evaluated first in float64, as RWKV-LM does."""
        return int(self.magic_prime * ((math.sqrt(5) - 1) / 2))

    @property
    def n_windows(self) -> int:
        """Windows of an epoch."""
        return self.magic_prime

    def window(self, sample: int) -> int:
        """Window of sample number `sample` (from 1). Exact: Python integers do not overflow."""
        return self.multiplier * sample**3 % self.magic_prime


@dataclass(frozen=True)
class ShuffledOrder:
    """Every one of `n_windows` windows once in an epoch, in an order of its own for each epoch and seed.

    A Feistel network on the pairs (row, column) of a grid that holds the windows: each round adds to one coordinate,
    modulo its size, a hash of the other, which can be undone. A number beyond the last window is permuted again (cycle
    walking), and ends below it (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """

    n_windows: int
    seed: int

    def window(self, sample: int) -> int:
        """Window of sample number `sample` (from 1)."""
        epoch, index = divmod(sample - 1, self.n_windows)
        rows = math.isqrt(self.n_windows - 1) + 1
        columns = -(-self.n_windows // rows)
        while True:
            row, column = divmod(index, columns)
            for row_key, column_key in _round_keys(self.seed, epoch):
                row = (row + _mix(column ^ row_key)) % rows
                column = (column + _mix(row ^ column_key)) % columns
            index = row * columns + column
            if index < self.n_windows:
                return index


_ROUNDS = 4
_WORD = 2**64 - 1


def _mix(value: int) -> int:
    """Finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit of the 64 depends on every bit of `value`."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[tuple[int, int], ...]:
    key = _mix(_mix(seed) + epoch)
    return tuple((_mix(key + 2 * number), _mix(key + 2 * number + 1)) for number in range(_ROUNDS))


@dataclass(frozen=True)
class SamplePlan:
    """Step -> windows, for one token file, context length and global batch.

    ctx_len: T, tokens in a sample. global_batch_size: samples in an optimizer step over all ranks.
    skipped: batches that no step trains on, as [first, end), apart and ascending; a rollback adds to them.
    is_packed: whether windows are packed documents, and not slices of the token file.
    """

    ctx_len: int
    order: CubicOrder | ShuffledOrder
    global_batch_size: int
    skipped: tuple[tuple[int, int], ...] = ()
    is_packed: bool = False

    @property
    def magic_prime(self) -> int:
        """The prime of RWKV-LM's order, 0 in another."""
        return self.order.magic_prime if isinstance(self.order, CubicOrder) else 0

    @property
    def order_name(self) -> str | None:
        """All that decides an order other than RWKV-LM's; None for that."""
        if isinstance(self.order, CubicOrder):
            return None
        return f"all, {self.order.n_windows} windows, seed {self.order.seed}"

    @property
    def tokens_per_step(self) -> int:
        return self.ctx_len * self.global_batch_size

    def window(self, sample: int) -> int:
        """Window of sample number `sample` (from 1)."""
        return self.order.window(sample)

    def offset(self, sample: int) -> int:
        """First token of sample number `sample` (from 1), where windows are slices of the token file."""
        return self.window(sample) * self.ctx_len

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
        return self.samples_of_batch(self.batch(step))

    def samples_of_batch(self, batch: int) -> range:
        """Sample numbers of a global batch, by its number from 0."""
        first = 1 + batch * self.global_batch_size
        return range(first, first + self.global_batch_size)

    def batch_of(self, sample: int) -> int:
        """Number of the global batch that sample number `sample` belongs to."""
        return (sample - 1) // self.global_batch_size

    def rank_samples(self, step: int, *, rank: int, world_size: int, micro_bsz: int) -> list[list[int]]:
        """The micro batches of one rank at one step: lists of `micro_bsz` sample numbers.

        Interleaved as in RWKV-LM (sample number = first + index * world_size + rank), so that the ranks' lists
        together are `samples(step)` for every split.
        """
        mine = self.samples(step)[rank::world_size]
        return [list(mine[start : start + micro_bsz]) for start in range(0, len(mine), micro_bsz)]


def plan_samples(manifest: DataManifest, data: DataConfig, ctx_len: int, global_batch_size: int) -> SamplePlan:
    """The plan of a run on prepared data. Raises DataError for too little of it, or data packed for other settings."""
    require_same_packing(manifest, data, ctx_len)
    if manifest.packing is None:
        name = data.order or "rwkv-lm"
        n_windows = (manifest.n_tokens - 1) // ctx_len
        prime = require_magic_prime(manifest.n_tokens, ctx_len) if name == "rwkv-lm" else 0
    else:
        name, n_windows = data.order or "all", manifest.packing.n_windows
        prime = _largest_prime_up_to(n_windows) or 0
    if n_windows < 1 or (name == "rwkv-lm" and not prime):
        needed = ctx_len + 1 if manifest.packing is None else 2 * ctx_len
        raise DataError(
            f"the prepared data has {manifest.n_tokens} tokens, too few for ctx_len {ctx_len}: {needed} are needed",
            remedy="Add data, or use a smaller model.ctx_len" + ("" if name == "all" else ", or data.order=all"),
        )
    order = CubicOrder(prime) if name == "rwkv-lm" else ShuffledOrder(n_windows, data.seed)
    return SamplePlan(ctx_len, order, global_batch_size, is_packed=manifest.packing is not None)


def require_same_packing(manifest: DataManifest, data: DataConfig, ctx_len: int) -> None:
    """Refuse data whose windows are not those that the configuration asks for. Raises DataError."""
    is_packed = manifest.packing is not None
    if (data.documents or "") == ("continue" if is_packed else "reset"):
        state = "packed" if is_packed else "not packed"
        raise DataError(
            f"data.documents is {data.documents}, but the data that is there is {state}", remedy=_PREPARE_AGAIN
        )
    if manifest.packing is not None and manifest.packing.ctx_len != ctx_len:
        packed_for = manifest.packing.ctx_len
        raise DataError(
            f"the data that is there is packed for samples of {packed_for} tokens, and model.ctx_len is {ctx_len}",
            remedy=f"Use model.ctx_len={packed_for}. {_PREPARE_AGAIN}",
        )


_PREPARE_AGAIN = "Name its inputs in data.inputs to prepare it again"
