"""Masks and packed documents: gradients that are exactly 0, and a window that is its documents, each alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VERSIONS, relative_error, some_tokens, tiny_model
from tiny_run import tiny_run_config

from rwkv_cluster.config import DataConfig, TrainingConfig
from rwkv_cluster.data.binidx import TokenFileWriter, open_tokens
from rwkv_cluster.data.dataset import MicroBatches, TokenDataset
from rwkv_cluster.data.horizon import Horizon
from rwkv_cluster.data.loss_mask import LossMask, LossMaskWriter
from rwkv_cluster.data.manifest import load_manifest
from rwkv_cluster.data.preparation.pack import pack
from rwkv_cluster.data.sampler import SamplePlan, ShuffledOrder
from rwkv_cluster.data.windows import FlatWindows, PackedWindows, TokenBatch
from rwkv_cluster.errors import TrainingError
from rwkv_cluster.model.loss import head_loss, target_loss
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.train.module import TrainingModule
from rwkv_cluster.train.run import train

CTX_LEN = 24
LENGTHS = [5, 9, 13, 2, 25, 7, 40, 3, 11, 6, 30, 8]
STARTS = np.cumsum(LENGTHS) - LENGTHS


def _windows(folder: Path, *, masked: bool) -> PackedWindows:
    """Tokens of documents, about a third of them trained on where `masked`, in packed windows."""
    n_tokens = sum(LENGTHS)
    with TokenFileWriter(folder / "t", np.uint16) as writer:
        writer.write(some_tokens(1, n_tokens)[0].numpy().astype(np.uint16), np.array(LENGTHS))
    mask = None
    if masked:
        bits = np.random.default_rng(0).random(n_tokens) < 0.3
        with LossMaskWriter(folder / "t.mask") as mask_writer:
            mask_writer.write(bits)
        mask = LossMask(folder / "t.mask", n_tokens)
    pack(folder / "t", folder / "w", DataConfig(), CTX_LEN, folder / "t.mask" if masked else None)
    return PackedWindows(open_tokens(folder / "t"), open_tokens(folder / "w"), CTX_LEN, mask)


def test_a_masked_row_has_a_gradient_of_exactly_zero_and_no_part_in_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 12, generator=generator, requires_grad=True)
    weight = torch.randn(30, 12, generator=generator)
    targets = torch.randint(0, 30, (40,), generator=generator)
    trained = torch.randperm(40, generator=generator)[:11].sort().values
    loss = head_loss(hidden.index_select(0, trained), weight, targets[trained], 1e-4, divisor=7.0)
    (gradient,) = torch.autograd.grad(loss, hidden)
    masked = torch.ones(40, dtype=torch.bool).index_fill(0, trained, False)
    assert torch.equal(gradient[masked], torch.zeros(29, 12))
    assert bool((gradient[trained].abs().sum(1) > 0).all())
    entropy = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    assert loss.item() == pytest.approx(entropy[trained].sum().item() / 7, rel=1e-6)


def test_what_is_not_trained_on_gives_its_hidden_state_no_gradient(tmp_path: Path) -> None:
    model = tiny_model("x070")
    batch = _windows(tmp_path, masked=True).read([0, 1])
    seen: list[torch.Tensor] = []
    model.ln_out.register_forward_hook(lambda *hooked: hooked[2].register_hook(seen.append) and None)
    target_loss(model, batch.inputs, batch.targets, 1e-4, starts=batch.starts, trained=batch.trained).backward()
    (gradient,) = seen
    assert batch.trained is not None
    with_gradient = gradient.flatten(0, 1).abs().sum(1).nonzero().flatten()
    assert with_gradient.tolist() == batch.trained.tolist()


def test_a_micro_batch_without_a_trained_target_has_the_loss_0_and_a_graph() -> None:
    model = tiny_model("x070")
    nothing = torch.empty(0, dtype=torch.int64)
    tokens = some_tokens(2, 9)
    for divisor in (None, 5.0):
        model.zero_grad()
        loss = target_loss(model, tokens[:, :-1], tokens[:, 1:], 1e-4, trained=nothing, divisor=divisor)
        loss.backward()
        assert loss.item() == 0
        used = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert len(used) > 10
        assert not any(bool(gradient.any()) for gradient in used)


def _gradients(model: RWKV) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("masked", [False, True], ids=["all trained", "masked"])
@pytest.mark.parametrize("model_type", VERSIONS)
def test_packed_windows_are_their_documents_each_alone(tmp_path: Path, model_type: str, masked: bool) -> None:
    """In float64, where a difference is one of the mathematics."""
    windows = _windows(tmp_path, masked=masked)
    spans = open_tokens(tmp_path / "w")
    tokens = torch.from_numpy(open_tokens(tmp_path / "t").read(0, sum(LENGTHS)).astype(np.int64))
    packed, alone = (tiny_model(model_type).double() for _ in range(2))

    batch = windows.read(range(len(spans)))
    assert batch.trained is not None
    loss = target_loss(packed, batch.inputs, batch.targets, starts=batch.starts, trained=batch.trained, divisor=1.0)
    loss.backward()
    total = 0.0
    for first, size in (pair for number in range(len(spans)) for pair in spans[number].reshape(-1, 2).tolist()):
        span = tokens[first : first + size + 1]
        bits = LossMask(tmp_path / "t.mask", len(tokens)).read(first + 1, size) if masked else np.ones(size, bool)
        trained = torch.from_numpy(np.flatnonzero(bits))
        part = target_loss(alone, span[None, :-1], span[None, 1:], trained=trained, divisor=1.0)
        part.backward()
        total += part.item()
    assert loss.item() == pytest.approx(total, rel=1e-12)
    found, wanted = _gradients(packed), _gradients(alone)
    assert found.keys() == wanted.keys()
    assert max(relative_error(found[name], wanted[name]) for name in found) < 1e-10


class _Step:
    """The mean over ranks and micro batches, as Lightning and DDP make it, of the loss of one optimizer step."""

    def __init__(self, windows: PackedWindows | FlatWindows, plan: SamplePlan) -> None:
        self._windows, self._plan = windows, plan

    def run(self, world_size: int, micro_bsz: int) -> tuple[float, dict[str, torch.Tensor]]:
        model = tiny_model("x070")
        module = TrainingModule(model, TrainingConfig(), self._plan, Horizon(1, 1, 1, 1))
        losses = []
        for rank in range(world_size):
            dataset = TokenDataset(self._windows, self._plan)
            for samples in MicroBatches(self._plan, 0, 1, rank, world_size, micro_bsz):
                losses.append(module(dataset.__getitems__(samples)))
        loss = torch.stack(losses).mean()
        loss.backward()
        return loss.item(), _gradients(model)


@pytest.mark.parametrize("kind", ["packed", "packed and masked", "one stream and masked"])
def test_the_loss_is_the_mean_over_trained_tokens_for_every_split(tmp_path: Path, kind: str) -> None:
    windows: PackedWindows | FlatWindows = _windows(tmp_path, masked="masked" in kind)
    if "stream" in kind:
        mask = LossMask(tmp_path / "t.mask", sum(LENGTHS))
        windows = FlatWindows(open_tokens(tmp_path / "t"), CTX_LEN, mask)
    plan = SamplePlan(CTX_LEN, ShuffledOrder(6, 0), 4)
    whole = windows.read([plan.window(sample) for sample in plan.samples(0)])
    loss, wanted = _Step(windows, plan).run(1, 4)
    assert loss == pytest.approx(_mean_over_trained(whole), rel=1e-5)
    for world_size, micro_bsz in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1)):
        split, gradients = _Step(windows, plan).run(world_size, micro_bsz)
        assert split == pytest.approx(loss, rel=1e-6)
        assert max(relative_error(gradients[name], wanted[name]) for name in wanted) < 1e-4


def _mean_over_trained(batch: TokenBatch) -> float:
    assert batch.trained is not None
    with torch.no_grad():
        logits = tiny_model("x070").hidden(batch.inputs, starts=batch.starts)
        logits = tiny_model("x070").head(logits).flatten(0, 1)
        entropy = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), reduction="none")
    return entropy[batch.trained].mean().item()


def test_a_loss_that_is_not_finite_names_its_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_CLUSTER_FAULT", "train.loss@0:hit")
    config = tiny_run_config(tmp_path, data={"documents": "reset"}, training={"max_steps": 1})
    with pytest.raises(TrainingError, match=r"those( on rank 0)? are windows \d+, \d+, \d+, \d+\."):
        train(config)
    events = [json.loads(line) for line in (tmp_path / "work/logs/events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["kind"] == "nonfinite"]
    packing = load_manifest(tmp_path / "work/data").packing
    assert packing is not None
    plan = SamplePlan(32, ShuffledOrder(packing.n_windows, 0), 4)
    assert event["windows"] == [plan.window(sample) for sample in (1, 2, 3, 4)]
