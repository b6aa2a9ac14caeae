"""Which charts a report has and what is in them, as data: `draw` makes pictures of it, `page` embeds the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from rwkv_cluster.report import series
from rwkv_cluster.report.run_data import Run
from rwkv_cluster.train.schedule import learning_rate, turning_steps

Style = Literal["raw", "line", "dashed"]
PART_NAMES = {"data_s": "data", "forward_s": "forward", "backward_s": "backward", "optimizer_s": "optimizer",
              "save_s": "saving", "eval_s": "evaluation"}  # fmt: skip
PART_COLORS = (4, 0, 5, 3, 1, 2)  # of the palette: neighbours differ in lightness too
NOISY = ("grad_norm", "tokens_per_s", "mfu")
WIDE_RANGE = 30.0  # of a norm's largest value to its smallest, from which its axis is logarithmic
MARKED = {
    "resume": "resumed",
    "rollback": "rolled back",
    "spike": "loss spike",
    "nonfinite": "not finite",
    "early_stop": "stopped early",
    "stop": "stopped",
}


@dataclass(frozen=True)
class Curve:
    """A line over tokens. color: number in the palette. n_records: of which `y` is the whole or a thinned part."""

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int
    style: Style
    markers: bool = False


@dataclass(frozen=True)
class Marks:
    """Where events of one kind happened. color: of the run where there are several, else None."""

    kind: str
    x: np.ndarray
    color: int | None

    @property
    def label(self) -> str:
        return f"{MARKED[self.kind]} ({len(self.x)})" if len(self.x) > 1 else MARKED[self.kind]


@dataclass(frozen=True)
class Stack:
    """Parts on top of each other, constant between edges. parts: values between the edges, by name."""

    edges: np.ndarray
    parts: dict[str, np.ndarray]


@dataclass(frozen=True)
class Chart:
    """One picture. log: the axis goes by powers of ten. note: for the caption. end: of its own axis of tokens."""

    key: str
    title: str
    unit: str
    curves: Sequence[Curve] = ()
    marks: Sequence[Marks] = ()
    stack: Stack | None = None
    log: bool = False
    note: str = ""
    end: float | None = None
    values: np.ndarray = field(default_factory=lambda: np.empty(0))
    """The recorded ones that are finite, from which the axis follows."""


def make(runs: Sequence[Run]) -> tuple[list[Chart], list[dict[str, Any]]]:
    """The charts that these runs have data for; and for each run the numbers in them, for JSON."""
    data: list[dict[str, Any]] = [{"name": run.name, "series": {}, "events": _told(run)} for run in runs]
    charts = [
        _loss(runs, data),
        _learning_rate(runs, data),
        _metric(runs, data, "grad_norm", "Gradient norm", "before clipping"),
        _noise_scale(runs, data),
        _update_ratios(runs, data),
        _metric(runs, data, "tokens_per_s", "Speed", "tokens/s"),
        _metric(runs, data, "mfu", "MFU", "share of the devices' peak"),
        _metric(runs, data, "memory_mb", "Peak memory of rank 0", "GB", scale=1e3),
        *(
            _parts(run, numbers, number if len(runs) > 1 else None)
            for number, (run, numbers) in enumerate(zip(runs, data, strict=True))
        ),
    ]
    return [chart for chart in charts if chart is not None], data


def _told(run: Run) -> list[dict[str, Any]]:
    return [{"step": event["step"], "kind": event["kind"]} for event in run.events]


def _loss(runs: Sequence[Run], data: list[dict[str, Any]]) -> Chart | None:
    alone = len(runs) == 1
    curves: list[Curve] = []
    values: list[np.ndarray] = []
    for color, (run, numbers) in enumerate(zip(runs, data, strict=True)):
        if not len(run.metrics["step"]):
            continue
        lines = {"loss": series.line(run.metrics, "loss"), "loss_smoothed": series.smoothed(run.metrics, "loss")}
        lines["val_loss"] = series.line(run.metrics, "val_loss")
        numbers["series"] |= {name: line.data() for name, line in lines.items()}
        raw, smooth, val = lines.values()
        values += [raw.value, val.value]
        if alone:
            curves.append(Curve("each step", raw.tokens, raw.value, color, "raw"))
        curves.append(Curve("training, smoothed" if alone else run.name, smooth.tokens, smooth.value, color, "line"))
        if len(val.value):
            label = "validation" if alone else f"{run.name}, validation"
            curves.append(Curve(label, val.tokens, val.value, 1 if alone else color, "dashed", markers=True))
        if np.isfinite(run.metrics["val_loss_ema"]).any():
            average = series.line(run.metrics, "val_loss_ema")
            numbers["series"]["val_loss_ema"] = average.data()
            values.append(average.value)
            label = "validation, average" if alone else f"{run.name}, validation of the average"
            curves.append(Curve(label, average.tokens, average.value, 2 if alone else color, "dashed", markers=True))
    unit = series.loss_unit([run.manifest for run in runs])
    chart = Chart("loss", "Loss", unit, curves, _all_marks(runs), note=_smoothing_note(runs))
    return _of_values(chart, values)


def _smoothing_note(runs: Sequence[Run]) -> str:
    span = series.smoothing_span(max((len(run.metrics["step"]) for run in runs), default=0))
    return f"smoothed: exponential mean over about {span:,} steps"


def _metric(
    runs: Sequence[Run], data: list[dict[str, Any]], name: str, title: str, unit: str, *, scale: float = 1.0
) -> Chart | None:
    """Chart of one field; smoothed where it is noise around a trend, and for one run with the values themselves."""
    curves, values, noisy = [], [], name in NOISY
    for color, (run, numbers) in enumerate(zip(runs, data, strict=True)):
        if not np.isfinite(run.metrics[name]).any():
            continue
        line = series.line(run.metrics, name)
        numbers["series"][name] = line.data()
        values.append(line.value / scale)
        if noisy:
            smooth = series.smoothed(run.metrics, name)
            numbers["series"][f"{name}_smoothed"] = smooth.data()
            each = [Curve("each step", line.tokens, line.value / scale, color, "raw")] if len(runs) == 1 else []
            curves += [
                *each,
                Curve(run.name if not each else "smoothed", smooth.tokens, smooth.value / scale, color, "line"),
            ]
        else:
            curves.append(Curve(run.name, line.tokens, line.value / scale, color, "line"))
    return _of_values(Chart(name, title, unit, curves), values, may_be_log=name == "grad_norm")


def _noise_scale(runs: Sequence[Run], data: list[dict[str, Any]]) -> Chart | None:
    """Quotient of the smoothed estimates, which scatter too widely one by one."""
    curves = []
    for color, (run, numbers) in enumerate(zip(runs, data, strict=True)):
        noise, signal = (series.smoothed(run.metrics, name) for name in ("grad_noise", "grad_signal"))
        scale = noise.value / np.where(signal.value > 0, signal.value, np.nan)
        if np.isfinite(scale).any():
            numbers["series"]["noise_scale"] = replace(noise, value=scale).data()
            curves.append(Curve(run.name, noise.tokens, scale, color, "line"))
    chart = Chart("noise_scale", "Gradient noise scale", "samples", curves, note=_smoothing_note(runs))
    return _of_values(chart, [curve.y for curve in curves], may_be_log=True)


def _update_ratios(runs: Sequence[Run], data: list[dict[str, Any]]) -> Chart | None:
    """Ratios of a run's parts; of several runs those of the blocks."""
    parts = ("blocks", "emb", "head") if len(runs) == 1 else ("blocks",)
    curves = []
    for number, (run, numbers) in enumerate(zip(runs, data, strict=True)):
        for color, part in enumerate(parts):
            line = series.line(run.metrics, f"update_ratio_{part}")
            if np.isfinite(line.value).any():
                numbers["series"][f"update_ratio_{part}"] = line.data()
                label, color = (part, color) if len(runs) == 1 else (run.name, number)
                curves.append(Curve(label, line.tokens, line.value, color, "line"))
    title = "Update to weights" if len(runs) == 1 else "Update to weights of the blocks"
    chart = Chart("update_ratio", title, "ratio of norms", curves)
    return _of_values(chart, [curve.y for curve in curves], may_be_log=True)


def _learning_rate(runs: Sequence[Run], data: list[dict[str, Any]]) -> Chart | None:
    """Recorded learning rates, and those to come of one run that is not at its end."""
    chart = _metric(runs, data, "lr", "Learning rate", "")
    if chart is None or len(runs) > 1 or (planned := _planned_lr(runs[0])) is None:
        return chart
    data[0]["series"]["lr_planned"] = planned.data()
    curve = Curve("to come", planned.tokens, planned.value, 1, "dashed")
    values = np.append(chart.values, planned.value)
    return replace(chart, curves=[*chart.curves, curve], values=values, end=float(planned.tokens[-1]))


def _planned_lr(run: Run) -> series.Series | None:
    """Learning rates from the last recorded step to the run's end."""
    last = int(run.metrics["step"][-1])
    if run.config is None or run.horizon is None or last >= run.horizon.total_steps:
        return None
    training, end = run.config.training, run.horizon
    per_step = end.global_batch_size * run.config.model.ctx_len
    steps = np.linspace(last, end.total_steps, min(end.total_steps - last, series.MOST_POINTS) + 1).astype(int)
    steps = np.unique([*steps, *(step + 1 for step in turning_steps(training, per_step, end.tokens) if step >= last)])
    rates = [
        learning_rate(step - 1, training=training, tokens_per_step=per_step, horizon_tokens=end.tokens)
        for step in steps.tolist()
    ]
    return series.Series(steps, steps * per_step, np.array(rates), end.total_steps - last)


def _of_values(chart: Chart, values: Sequence[np.ndarray], *, may_be_log: bool = False) -> Chart | None:
    """The chart with the finite ones of `values`, None without any. may_be_log: powers of ten where they reach far."""
    finite = np.concatenate([np.empty(0), *(some[np.isfinite(some)] for some in values)])
    if not len(finite):
        return None
    is_log = bool(may_be_log and finite.min() > 0 and finite.max() > WIDE_RANGE * finite.min())
    return replace(chart, log=is_log, values=finite)


def _all_marks(runs: Sequence[Run]) -> list[Marks]:
    return [
        Marks(kind, run.tokens_at(steps), color if len(runs) > 1 else None)
        for color, run in enumerate(runs)
        for kind in MARKED
        if len(steps := _steps(run, kind)) and len(run.metrics["step"])
    ]


def _steps(run: Run, kind: str) -> np.ndarray:
    """Steps of events of a kind, each once, and of metrics that are not finite. A stop that was continued is none."""
    steps = {float(event["step"]) for event in run.events if event["kind"] == kind}
    if kind == "stop":
        steps -= {float(event["step"]) for event in run.events if event["kind"] == "resume"}
    if kind == "nonfinite":
        steps |= set(run.metrics["step"][~np.isfinite(run.metrics["loss"])].tolist())
    return np.array(sorted(steps))


def _parts(run: Run, numbers: dict[str, Any], number: int | None) -> Chart | None:
    if not len(run.parts["step"]) or not len(run.metrics["step"]):
        return None
    means, width = series.bars(run.parts, series.PARTS)
    tokens = run.tokens_at(means["step"])
    numbers["series"]["step_parts"] = {
        "step": series.integers(means["step"]),
        "tokens": series.integers(tokens),
        "steps_each": width,
        **{name: series.numbers(means[name]) for name in series.PARTS},
    }
    half = np.diff(tokens).mean() / 2 if len(tokens) > 1 else run.tokens_at(np.array([width]))[0] / 2
    edges = np.append(tokens - half, tokens[-1] + half)
    total = sum((means[name] for name in series.PARTS), np.zeros(len(tokens)))
    key, title = (
        ("step_parts", "Time of a step") if number is None else (f"step_parts_{number}", f"Time of a step: {run.name}")
    )
    note = f"mean of {width} steps each, and of all ranks" if width > 1 else "mean of all ranks"
    return Chart(
        key, title, "seconds", stack=Stack(edges, {name: means[name] for name in series.PARTS}), values=total, note=note
    )
