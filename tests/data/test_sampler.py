"""The order of samples: RWKV-LM's published values, the bijection, and independence of how a step is split."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_cluster.config import DataConfig, TrainingConfig
from rwkv_cluster.data.batch_size import accumulation
from rwkv_cluster.data.horizon import Horizon, horizon
from rwkv_cluster.data.manifest import DataManifest, FileRecord, PackingRecord
from rwkv_cluster.data.sampler import (
    CubicOrder,
    SamplePlan,
    ShuffledOrder,
    is_prime,
    largest_magic_prime,
    plan_samples,
    require_magic_prime,
)
from rwkv_cluster.errors import ConfigError, DataError

MINIPILE_TOKENS = 1_498_226_207


def test_published_values_of_minipile() -> None:
    plan = SamplePlan(512, CubicOrder(largest_magic_prime(MINIPILE_TOKENS, 512)), 16)
    assert (plan.magic_prime, plan.order.multiplier) == (2_926_181, 1_808_479)
    assert [plan.offset(j) for j in range(1, 6)] == [925941248, 1414711296, 1029138944, 830257664, 380896256]
    assert largest_magic_prime(MINIPILE_TOKENS, 4096) == 365_759
    assert largest_magic_prime(332_115_325_534, 4096) == 81_082_817


def test_is_prime_agrees_with_a_sieve() -> None:
    limit = 20_000
    sieve = bytearray([1]) * limit
    sieve[:2] = b"\0\0"
    for n in range(2, limit):
        if sieve[n]:
            sieve[n * n :: n] = bytes(len(range(n * n, limit, n)))
    assert [n for n in range(limit) if is_prime(n)] == [n for n in range(limit) if sieve[n]]


@pytest.mark.parametrize("carmichael", [561, 41041, 825265, 321197185, 3215031751, 3825123056546413051])
def test_pseudoprimes_are_not_prime(carmichael: int) -> None:
    assert not is_prime(carmichael)


def test_every_slot_is_visited_once_for_every_magic_prime_below_2000() -> None:
    for prime in (p for p in range(2, 2000) if p % 3 == 2 and is_prime(p)):
        plan = SamplePlan(1, CubicOrder(prime), 1)
        assert sorted(plan.offset(j) for j in range(1, prime + 1)) == list(range(prime))


@given(st.integers(2, 2**40), st.integers(1, 2**50))
@settings(max_examples=200, deadline=None)
def test_offsets_are_exact_beyond_64_bits(bound: int, sample: int) -> None:
    prime = next(p for p in range(bound, 1, -1) if p % 3 == 2 and is_prime(p))
    plan = SamplePlan(7, CubicOrder(prime), 1)
    kappa, j = plan.order.multiplier % prime, sample % prime
    stepwise = kappa * j % prime * j % prime * j % prime  # reduced after each product
    assert plan.offset(sample) == stepwise * 7


@st.composite
def _splits(draw: st.DrawFn) -> tuple[int, int, int]:
    return draw(st.integers(1, 8)), draw(st.integers(1, 9)), draw(st.integers(1, 5))


@given(_splits(), st.integers(0, 10**6))
@settings(max_examples=500, deadline=None)
def test_ranks_together_are_the_global_batch_in_order(split: tuple[int, int, int], step: int) -> None:
    world_size, micro_bsz, accumulate = split
    plan = SamplePlan(16, CubicOrder(1019), world_size * micro_bsz * accumulate)
    ranks = [
        plan.rank_samples(step, rank=rank, world_size=world_size, micro_bsz=micro_bsz) for rank in range(world_size)
    ]
    assert all(len(batches) == accumulate and all(len(b) == micro_bsz for b in batches) for batches in ranks)
    flat = [[sample for batch in batches for sample in batch] for batches in ranks]
    assert [j for row in zip(*flat, strict=True) for j in row] == list(plan.samples(step))


def test_rank_order_is_rwkv_lms() -> None:
    """ii = 1 + epoch * 40320 + (idx * world_size) + rank, idx counting a rank's samples."""
    plan = SamplePlan(16, CubicOrder(100_003), 8)
    epoch_steps = 40320 // 8
    for epoch, step_in_epoch, rank in [(0, 0, 0), (0, 3, 1), (2, 5, 1)]:
        expected = [1 + epoch * 40320 + idx * 2 + rank for idx in range(step_in_epoch * 4, step_in_epoch * 4 + 4)]
        batches = plan.rank_samples(epoch * epoch_steps + step_in_epoch, rank=rank, world_size=2, micro_bsz=4)
        assert batches == [expected]


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 600))
@settings(max_examples=300, deadline=None)
def test_accumulation_multiplies_out_or_names_batches_that_do(micro: int, world: int, batch: int) -> None:
    try:
        steps = accumulation(micro_bsz=micro, world_size=world, accumulate_grad_batches=None, global_batch_size=batch)
    except ConfigError as error:
        assert batch % (micro * world)
        named = int(str(error).split("Use training.global_batch_size ")[1].split()[0].rstrip(","))
        assert named % (micro * world) == 0
    else:
        assert steps * micro * world == batch


def test_indivisible_batch_lists_the_divisors() -> None:
    with pytest.raises(ConfigError, match=r"micro_bsz of 1, 2, 4, 8 or 16"):
        accumulation(micro_bsz=11, world_size=2, accumulate_grad_batches=None, global_batch_size=32)


def test_too_little_data_says_found_needed_and_largest_ctx_len() -> None:
    with pytest.raises(DataError, match=r"100 tokens.*ctx_len 64: 192 are needed.*at most 33"):
        require_magic_prime(100, 64)
    assert require_magic_prime(100, 33) == 2
    assert require_magic_prime(192, 64) == 2
    with pytest.raises(DataError):
        require_magic_prime(191, 64)


def test_last_slot_has_its_target() -> None:
    for n_tokens in range(9, 400):
        plan = SamplePlan(3, CubicOrder(require_magic_prime(n_tokens, 3)), 1)
        assert max(plan.offset(j) for j in range(1, plan.magic_prime + 1)) + 3 + 1 <= n_tokens


def _horizon(**bounds: int | None) -> Horizon:
    return horizon(SamplePlan(10, CubicOrder(101), 16), TrainingConfig(**bounds))


def test_one_epoch_is_one_pass_over_the_slots() -> None:
    end = _horizon()
    assert (end.total_steps, end.tokens) == (7, 7 * 160)  # ceil(101 / 16)
    assert _horizon(num_epochs=3).total_steps == 19  # ceil(303 / 16)


def test_the_earliest_bound_ends_the_run_and_sets_the_horizon() -> None:
    assert _horizon(num_epochs=3, max_steps=5) == Horizon(5, 800, 101, 16)
    assert _horizon(max_tokens=1000) == Horizon(7, 1000, 101, 16)
    assert _horizon(num_epochs=1, max_tokens=10**9).total_steps == 7


def test_mini_epochs_of_rwkv_lm() -> None:
    plan = SamplePlan(512, CubicOrder(2_926_181), 16)
    end = horizon(plan, TrainingConfig(max_tokens=MINIPILE_TOKENS, samples_per_epoch=40320))
    assert [end.epoch_end(e) for e in range(3)] == [2520, 5040, 7560]
    assert [end.epoch_of(s) for s in (0, 2519, 2520)] == [0, 0, 1]
    assert end.tokens == MINIPILE_TOKENS


@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 400))
@settings(max_examples=200, deadline=None)
def test_epochs_tile_the_steps(epoch_samples: int, batch: int, total_steps: int) -> None:
    end = Horizon(total_steps, 1, epoch_samples, batch)
    for step in range(total_steps):
        epoch = end.epoch_of(step)
        assert end.epoch_end(epoch) > step
        assert epoch == 0 or end.epoch_end(epoch - 1) <= step


@pytest.mark.parametrize("n_windows", [1, 2, 3, 5, 40, 1000])
def test_the_order_all_uses_every_window_once_in_an_epoch(n_windows: int) -> None:
    plan = SamplePlan(8, ShuffledOrder(n_windows, seed=3), 1)
    epochs = [[plan.window(1 + epoch * n_windows + index) for index in range(n_windows)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n_windows)) for epoch in epochs)
    if n_windows >= 40:
        assert len({tuple(epoch) for epoch in epochs}) == 3
        other = SamplePlan(8, ShuffledOrder(n_windows, seed=4), 1)
        assert [other.window(1 + index) for index in range(n_windows)] != epochs[0]


def test_the_order_all_of_many_windows_repeats_none_and_leaves_no_stretch_out() -> None:
    n_windows = 2**31 + 11
    order = ShuffledOrder(n_windows, seed=2**63 - 1)
    seen = [order.window(1 + n_windows + index) for index in range(20_000)]
    assert len(set(seen)) == 20_000
    assert 0 <= min(seen) < max(seen) < n_windows
    counts = [sum(window * 10 // n_windows == tenth for window in seen) for tenth in range(10)]
    assert max(abs(count - 2000) for count in counts) < 6 * 2000**0.5


def test_neighbours_are_as_far_apart_in_the_order_all_as_in_a_random_one() -> None:
    """The mean of |difference| of two numbers below n is n / 3."""
    order = ShuffledOrder(1000, seed=0)
    windows = [order.window(1 + index) for index in range(1000)]
    mean = sum(abs(a - b) for a, b in pairwise(windows)) / 999
    assert abs(mean - 1000 / 3) < 30


def test_the_order_all_is_the_same_on_every_machine() -> None:
    assert [ShuffledOrder(40, seed=0).window(1 + index) for index in range(6)] == [34, 22, 12, 13, 9, 15]


def _manifest(n_tokens: int, packing: PackingRecord | None = None) -> DataManifest:
    files = {
        name: FileRecord(bytes=0, sha256="0" * 64) for name in ("d.bin", "d.idx", "d.windows.bin", "d.windows.idx")
    }
    facts = {"version": 1, "name": "d", "prefix": "d", "n_documents": 1, "n_source_documents": 1, "dtype": "uint16"}
    facts |= {"vocab_size": 9, "tokenizer": {}, "options": {}, "n_sources": 1, "source_digest": "0" * 64}
    return DataManifest(**facts, n_tokens=n_tokens, files=files, packing=packing)


def test_the_order_all_does_with_one_window() -> None:
    plan = plan_samples(_manifest(33), DataConfig(order="all"), 32, 2)
    assert (plan.order, plan.magic_prime) == (ShuffledOrder(1, 0), 0)
    with pytest.raises(DataError, match=r"has 32 tokens, too few for ctx_len 32: 33 are needed"):
        plan_samples(_manifest(32), DataConfig(order="all"), 32, 2)
    with pytest.raises(DataError, match=r"96 are needed.*data\.order=all"):
        plan_samples(_manifest(33), DataConfig(), 32, 2)


def test_packed_windows_are_all_used_unless_another_order_is_named() -> None:
    packing = PackingRecord(ctx_len=32, n_windows=10, n_spans=20, n_positions=300, n_trained=300)
    plan = plan_samples(_manifest(320, packing), DataConfig(seed=5), 32, 2)
    assert (plan.order, plan.is_packed, plan.order_name) == (ShuffledOrder(10, 5), True, "all, 10 windows, seed 5")
    assert plan_samples(_manifest(320, packing), DataConfig(order="rwkv-lm"), 32, 2).order == CubicOrder(5)
    with pytest.raises(DataError, match=r"packed for samples of 32 tokens, and model\.ctx_len is 64"):
        plan_samples(_manifest(320, packing), DataConfig(), 64, 2)
    with pytest.raises(DataError, match=r"documents is continue, but .* is packed"):
        plan_samples(_manifest(320, packing), DataConfig(documents="continue"), 32, 2)
    with pytest.raises(DataError, match=r"documents is reset, but .* is not packed"):
        plan_samples(_manifest(320), DataConfig(documents="reset"), 32, 2)
