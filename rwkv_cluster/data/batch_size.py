"""The arithmetic of the global batch: micro batches, ranks, and how many micro batches make a step."""

from __future__ import annotations

from rwkv_cluster.errors import ConfigError


def accumulation(
    *, micro_bsz: int, world_size: int, accumulate_grad_batches: int | None, global_batch_size: int | None
) -> int:
    """Micro batches per optimizer step. Raises ConfigError, with values that would do, when they do not fit."""
    if global_batch_size is None:
        return accumulate_grad_batches or 1
    per_pass = micro_bsz * world_size
    if global_batch_size % per_pass == 0:
        return global_batch_size // per_pass
    below = global_batch_size // per_pass * per_pass
    batches = f"{below} or {below + per_pass}" if below else str(per_pass)
    if global_batch_size % world_size:
        remedy = f"Use training.global_batch_size {batches}"
    else:
        sizes = listing(divisors(global_batch_size // world_size))
        remedy = f"Use training.global_batch_size {batches}, or a training.micro_bsz of {sizes}"
    raise ConfigError(
        f"training.global_batch_size {global_batch_size} is not a multiple of micro_bsz {micro_bsz} * "
        f"{world_size} rank{'s' if world_size > 1 else ''} = {per_pass}",
        remedy=remedy,
    )


def divisors(number: int) -> list[int]:
    """Divisors of a positive `number`, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def listing(numbers: list[int]) -> str:
    """Numbers for a sentence, the middle of many left out: "1, 2 or 4"."""
    if not numbers:
        return ""
    if len(numbers) == 1:
        return str(numbers[0])
    shown = numbers if len(numbers) <= 12 else [*numbers[:11], numbers[-1]]
    return ", ".join(map(str, shown[:-1])) + f" or {shown[-1]}"
