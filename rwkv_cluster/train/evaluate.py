"""Loss on held-out tokens: the same number for every number of ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_cluster.config import Config
from rwkv_cluster.data.dataset import validation_batches
from rwkv_cluster.data.horizon import is_due
from rwkv_cluster.data.preparation.prepare import load_manifest
from rwkv_cluster.data.run_tokenizer import tokenizer_of_run
from rwkv_cluster.data.sampler import require_same_packing
from rwkv_cluster.data.verify import check_files
from rwkv_cluster.data.windows import TokenBatch, Windows, open_validation
from rwkv_cluster.errors import CheckpointError, ConfigError, DataError
from rwkv_cluster.interchange.state_file import load_state
from rwkv_cluster.model.loss import target_loss
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.runtime.terminal.time_left import Countdown
from rwkv_cluster.tokenizer.token_bytes import token_bytes
from rwkv_cluster.train.checkpoint.weights import model_from_weights, weights_of
from rwkv_cluster.train.distributed import collectives
from rwkv_cluster.train.guards.early_stop import EarlyStopState
from rwkv_cluster.train.memory.inference import inference_dtype
from rwkv_cluster.train.metrics.events import Events
from rwkv_cluster.train.placement import DTYPES
from rwkv_cluster.workdir import WorkDir

log = logging.getLogger("rwkv_cluster")

_STAND_IN = TokenBatch.of(torch.zeros(1, 2, dtype=torch.int64))  # for a rank whose turn has no batch


@dataclass(frozen=True)
class EvalResult:
    """loss: mean cross entropy in nats per token. n_tokens: trained targets that it is the mean of.

    n_bytes: of text that these stand for; None where that is not known.
    """

    loss: float
    n_tokens: int
    n_bytes: int | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """(n_tokens / n_bytes) * loss / ln 2 (Gao et al. 2020, The Pile, section 3.1); None where there is no text."""
        return self.loss * self.n_tokens / self.n_bytes / math.log(2) if self.n_bytes else None


@torch.no_grad()
def evaluate(
    loss_of: Callable[[TokenBatch], Tensor],
    windows: Windows,
    *,
    batch_size: int,
    max_tokens: int,
    device: torch.device,
    token_sizes: Tensor | None = None,
) -> EvalResult:
    """Mean loss over the trained ones of the first `max_tokens` targets of `windows`, which start from a zero state.

    Collective: every rank must call it, and takes its share of the batches. loss_of: a batch on `device` -> its mean
    loss. token_sizes: bytes [V] by token id, int64 on the CPU.
    """
    rank, world_size = collectives.position()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    batches = validation_batches(
        windows,
        batch_size=batch_size,
        max_tokens=max_tokens,
        rank=rank,
        world_size=world_size,
    )
    for batch in batches:
        loss = loss_of(_on(device, _STAND_IN if batch is None else batch))
        if batch is not None:
            targets = batch.targets if batch.trained is None else batch.targets.flatten()[batch.trained]
            n_bytes = 0 if token_sizes is None else int(token_sizes[targets].sum())
            counts = torch.tensor([targets.numel(), n_bytes], dtype=torch.float64, device=device)
            sums += torch.cat([loss.double()[None] * targets.numel(), counts])
    total, all_tokens, all_bytes = collectives.sum_over_ranks(sums).tolist()
    mean = total / all_tokens if all_tokens else math.nan
    return EvalResult(mean, int(all_tokens), None if token_sizes is None else int(all_bytes))


def _on(device: torch.device, batch: TokenBatch) -> TokenBatch:
    starts, trained = (None if part is None else part.to(device) for part in (batch.starts, batch.trained))
    return batch._replace(
        inputs=batch.inputs.to(device), targets=batch.targets.to(device), starts=starts, trained=trained
    )


class Evaluator:
    """Validation of a model in training, and early stopping by it. Every rank has one, and all see the same.

    windows: None without validation. token_sizes: see `evaluate`. improvement: what an earlier session has left.
    """

    def __init__(
        self,
        config: Config,
        windows: Windows | None,
        token_sizes: Tensor | None,
        improvement: EarlyStopState,
        events: Events,
    ) -> None:
        self.improvement = improvement
        self.last: EvalResult | None = None
        """The session's last evaluation that was accepted."""
        self._config = config
        self._windows = windows
        self._token_sizes = token_sizes
        self._events = events

    def is_due(self, step: int, *, epoch_ends: bool, run_ends: bool) -> bool:
        """Whether it is time after so many steps. Always at the run's end."""
        interval = self._config.training.val_interval_steps
        return self._windows is not None and (run_ends or is_due(step, interval, epoch_ends=epoch_ends))

    def evaluate(
        self, loss_of: Callable[[TokenBatch], Tensor], step: int, device: torch.device, *, of_ema: bool = False
    ) -> EvalResult:
        """Evaluate after so many steps. Collective. loss_of: see `evaluate`; what it raises ends the evaluation.

        of_ema: for the event, whether the model has the averaged weights.
        """
        assert self._windows is not None
        result = evaluate(
            loss_of,
            self._windows,
            batch_size=self._config.training.micro_bsz,
            max_tokens=self._config.training.val_max_tokens,
            device=device,
            token_sizes=self._token_sizes,
        )
        self._events.add(
            "validation_ema" if of_ema else "validation", step, **vars(result), bits_per_byte=result.bits_per_byte
        )
        return result

    def ends_run(self, result: EvalResult, step: int) -> bool:
        """Whether early stopping ends the run with `result`, which is not accepted yet. If so, an event says it."""
        improvement = self._improvement_with(result)
        is_over = improvement.ends(self._config.training.early_stop_patience)
        if is_over:
            self._events.add("early_stop", step, **vars(improvement))
        return is_over

    def accept(self, result: EvalResult) -> None:
        """Let `result` count for early stopping: nothing has cut short what follows its step."""
        self.improvement, self.last = self._improvement_with(result), result

    def _improvement_with(self, result: EvalResult) -> EarlyStopState:
        return self.improvement.after(result.loss, self._config.training.early_stop_min_delta)


def sizes_of(tokenizer: Any) -> Tensor | None:
    """`token_sizes` of `evaluate`."""
    sizes = token_bytes(tokenizer)
    return None if sizes is None else torch.from_numpy(sizes)


def evaluate_run(config: Config, weights: Path | None = None, state: Path | None = None) -> EvalResult:
    """Loss of a run's newest weights, or of a file or folder of weights, on all of the run's validation tokens.

    In fp32, on a GPU without the memory for that in 16 bits. state: file of a state that each document begins from, or
    each sample where documents are not told apart.
    Raises DataError when the work directory holds no validation data, CheckpointError when it holds no weights.
    """
    work = WorkDir(config.work_dir)
    manifest = load_manifest(work.data)
    if manifest.validation is None:
        raise DataError(
            f"{work.data} has no validation data: data.validation_fraction was 0",
            remedy="Set it and prepare the data in a new work_dir",
        )
    check_files(manifest, work.data, manifest.validation_files)
    device = "cuda" if torch.cuda.is_available() and config.training.accelerator != "cpu" else "cpu"
    require_same_packing(manifest, config.data, config.model.ctx_len)
    source = weights or work.root
    model = _model_of(source, device, config)
    if state is not None:
        load_state(model, state)
    n_rows = model.config.vocab_size or 0
    if n_rows < manifest.vocab_size:
        raise CheckpointError(
            f"{source} has {n_rows:,} vocabulary rows, but the tokens in {work.data} are ids up to "
            f"{manifest.vocab_size - 1:,}",
            remedy="Use weights that were trained with the tokenizer of this data",
        )
    windows = open_validation(manifest, work.data, config.model.ctx_len)
    if windows is None:
        raise DataError(
            f"the validation data in {work.data} has nothing to predict", remedy="Hold out more of the data"
        )
    packing = manifest.validation.packing
    n_tokens = packing.n_windows * packing.ctx_len if packing else manifest.validation.n_tokens - 1
    with Countdown("evaluating", n_tokens, "tokens") as left:

        def loss_of(batch: TokenBatch) -> Tensor:
            loss = target_loss(model, batch.inputs, batch.targets, starts=batch.starts, trained=batch.trained)
            left.advance(batch.inputs.numel())
            return loss

        return evaluate(
            loss_of,
            windows,
            batch_size=config.training.micro_bsz,
            max_tokens=n_tokens,
            device=torch.device(device),
            token_sizes=_sizes_of_run(config),
        )


def _model_of(source: Path, device: str, config: Config) -> RWKV:
    tensors, ctx_len = weights_of(source), config.model.ctx_len
    dtype = inference_dtype(
        tensors, device, tokens=config.training.micro_bsz * ctx_len, trained_in=DTYPES[config.training.precision]
    )
    return model_from_weights(source, tensors, ctx_len=ctx_len, device=device, dtype=dtype)


def _sizes_of_run(config: Config) -> Tensor | None:
    """None with a word about it where the tokenizer cannot be had: without it the loss is known all the same."""
    try:
        return sizes_of(tokenizer_of_run(config.data.tokenizer, WorkDir(config.work_dir).data))
    except (ConfigError, DataError) as error:
        log.warning("no bits per byte: %s", error)
        return None
