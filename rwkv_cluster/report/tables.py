"""The tables of a report: summary, where the time went, configuration, data, environment, checkpoints, events."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rwkv_cluster.config import Config
from rwkv_cluster.report import series
from rwkv_cluster.report.charts import PART_NAMES
from rwkv_cluster.report.draw import short
from rwkv_cluster.report.markup import details, escape, section, table
from rwkv_cluster.report.run_data import Run
from rwkv_cluster.report.run_files import moment

MOST_EVENTS = 200
NONE = "–"


def summary(run: Run) -> dict[str, tuple[str, str]]:
    """What counts, by name: the figure, and what to know about it."""
    step, loss = run.metrics["step"], series.smoothed(run.metrics, "loss").value
    if not len(step):
        return {}
    val, val_step = _last(run, "val_loss")
    speed, memory = run.metrics["tokens_per_s"], run.metrics["memory_mb"]
    total = f"of {run.total_steps:,}" if run.total_steps else ""
    resumes = sum(event["kind"] == "resume" for event in run.events)
    cards = {
        "Steps": (f"{step[-1]:,.0f}", total),
        "Tokens": (short(run.metrics["tokens"][-1]), f"{run.metrics['tokens'][-1]:,.0f}"),
        "Training loss": (_number(loss[-1], 4), f"smoothed, {series.loss_unit([run.manifest])}"),
        "Validation loss": (_number(val, 4), f"at step {val_step:,.0f}" if val is not None else "none"),
        "Speed": (short(float(np.nanmedian(speed))) if np.isfinite(speed).any() else NONE, "tokens/s, median"),
        "Peak memory": (
            _bytes(float(np.nanmax(memory))) if np.isfinite(memory).any() else NONE,
            "of rank 0",
        ),
    }
    return cards | ({"Sessions": (str(resumes + 1), f"{resumes} resumed")} if run.events else {})


def _last(run: Run, name: str) -> tuple[float | None, float]:
    present = np.flatnonzero(np.isfinite(run.metrics[name]))
    if not len(present):
        return None, 0
    return float(run.metrics[name][present[-1]]), float(run.metrics["step"][present[-1]])


def _number(value: float | None, decimals: int) -> str:
    return NONE if value is None or not np.isfinite(value) else f"{value:,.{decimals}f}"


def _bytes(megabytes: float) -> str:
    return f"{short(megabytes / 1e3)} GB" if megabytes >= 1e3 else f"{megabytes:,.0f} MB"


def tiles(run: Run) -> str:
    """The summary of one run."""
    cells = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(figure)}<small>{escape(about)}</small></dd></div>"
        for name, (figure, about) in summary(run).items()
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def comparison(runs: Sequence[Run]) -> str:
    """The summaries of several runs, a row each."""
    summaries = [summary(run) for run in runs]
    names = list(dict.fromkeys(name for row in summaries for name in row))
    rows = [
        [run.name, *(row.get(name, (NONE, ""))[0] for name in names)] for run, row in zip(runs, summaries, strict=True)
    ]
    return section("Runs", table("Runs", ["run", *map(str.lower, names)], rows, numbers=range(1, len(names) + 1)))


def branches(runs: Sequence[Run]) -> str:
    """The runs as a tree where some have branched off others. A trunk that is no run of the report has its path."""
    if all(run.parent is None for run in runs):
        return ""
    roots = {os.path.realpath(run.work.root): run for run in runs}
    children: dict[str, list[Run]] = {}
    for run in runs:
        if run.parent is not None:
            children.setdefault(os.path.realpath(run.parent.work_dir), []).append(run)

    def item(root: str, words: str) -> str:
        below = sorted(children.get(root, []), key=lambda run: run.parent.step if run.parent else 0)
        items = "".join(item(os.path.realpath(run.work.root), _of_branch(run)) for run in below)
        return f"<li>{escape(words)}{f'<ul>{items}</ul>' if items else ''}</li>"

    trunks = [root for root in dict.fromkeys([*roots, *children]) if root not in roots or roots[root].parent is None]
    items = "".join(item(root, roots[root].name if root in roots else root) for root in trunks)
    return section("Branches", f'<ul class="branches">{items}</ul>')


def _of_branch(run: Run) -> str:
    assert run.parent is not None
    return f"{run.name}, from step {run.parent.step:,} ({short(run.parent.tokens_seen)} tokens) on"


def time_spent(runs: Sequence[Run]) -> str:
    """Where the time went: seconds of each part, as the mean of the ranks, and the slowest rank."""
    timed = [run for run in runs if run.rank_totals]
    rows = []
    for run in timed:
        means = {part: float(np.mean([totals[part] for totals in run.rank_totals.values()])) for part in series.PARTS}
        for part, seconds in means.items():
            slowest = max(run.rank_totals, key=lambda rank: run.rank_totals[rank][part])
            share = seconds / (sum(means.values()) or 1)
            row: list[object] = [PART_NAMES[part], f"{seconds:,.1f}", f"{share:.1%}"]
            row += [f"{run.rank_totals[slowest][part]:,.1f} (rank {slowest})"] if len(run.rank_totals) > 1 else []
            rows.append([run.name, *row] if len(runs) > 1 else row)
    if not rows:
        return ""
    columns = ["run"] * (len(runs) > 1) + ["part", "seconds", "share"]
    columns += ["slowest rank, seconds"] * (len(rows[0]) > len(columns))
    first = columns.index("seconds")
    return section("Where the time went", table("Time", columns, rows, numbers=range(first, len(columns))))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested fields by their dotted names, values as YAML would write short ones."""
    flattened: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flattened |= flat(value, f"{prefix}{name}.")
        else:
            flattened[prefix + name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flattened


def configuration(runs: Sequence[Run]) -> str:
    """Configuration of one run: what differs from the defaults, then all; of several: what differs between them."""
    configurations = [flat(run.config.model_dump(mode="json")) if run.config else {} for run in runs]
    if len(runs) > 1:
        return _differences("Configuration: fields that differ", runs, configurations)
    if not configurations[0]:
        return ""
    defaults = flat(Config().model_dump(mode="json"))
    chosen = [(name, value) for name, value in configurations[0].items() if value != defaults.get(name)]
    everything = details(
        f"All {len(configurations[0])} fields", table("All fields", ["field", "value"], configurations[0].items())
    )
    return section(
        "Configuration", table("Fields that are not the default", ["not the default", "value"], chosen), everything
    )


def _differences(title: str, runs: Sequence[Run], columns: Sequence[Mapping[str, str]]) -> str:
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, NONE) for column in columns)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    content = table(title, ["field", *(run.name for run in runs)], rows) if rows else "<p class=note>None.</p>"
    return section(title, content)


def data(runs: Sequence[Run]) -> str:
    """The manifests of the prepared data, a column each."""
    manifests = [_manifest(run) for run in runs]
    return _side_by_side("Data", runs, manifests)


def _manifest(run: Run) -> dict[str, str]:
    manifest = run.manifest
    if manifest is None:
        return {}
    held_out = manifest.validation
    facts = {
        "tokens": f"{manifest.n_tokens:,}",
        "documents": f"{manifest.n_documents:,} from {manifest.n_source_documents:,}",
        "held out": f"{held_out.n_tokens:,} tokens in {held_out.n_documents:,} documents" if held_out else "none",
        "samples": manifest.samples_in_words or "one stream, all of it trained on",
        "held-out samples": held_out.packing.in_words() if held_out and held_out.packing else NONE,
        "left out": f"{manifest.n_empty_documents:,} empty documents, {manifest.n_bad_lines:,} bad lines",
        "vocabulary": f"{manifest.vocab_size:,}, {manifest.dtype}",
        "tokenizer": str(manifest.tokenizer.get("class", NONE)),
        "fingerprint": manifest.fingerprint,
    }
    return facts | {
        name: f"{record.bytes:,} bytes, sha256 {record.sha256[:16]}…" for name, record in manifest.files.items()
    }


def _side_by_side(title: str, runs: Sequence[Run], found: Sequence[Mapping[str, str]]) -> str:
    names = dict.fromkeys(name for column in found for name in column)
    if not names:
        return ""
    rows = [[name, *(column.get(name, NONE) for column in found)] for name in names]
    columns = ["", "value"] if len(runs) == 1 else ["", *(run.name for run in runs)]
    return section(title, table(title, columns, rows))


def environment(runs: Sequence[Run]) -> str:
    """Versions and machine of each run's newest session; and what changed between sessions."""
    facts = [_facts(run.sessions[-1]) if run.sessions else {} for run in runs]
    changes = [
        [run.name, f"{later.get('step', NONE)}", name, f"{earlier.get(name, NONE)}", f"{later.get(name, NONE)}"]
        for run in runs
        for earlier, later in zip(run.sessions, run.sessions[1:], strict=False)
        for name in _facts(later)
        if name not in ("time", "step", "slurm_job") and earlier.get(name) != later.get(name)
    ]
    shown = _side_by_side("Environment", runs, facts)
    if changes:
        columns = ["run", "from step", "what", "before", "after"]
        shown += details("What changed between sessions", table("Changes", columns, changes))
    return shown


def _facts(session: Mapping[str, Any]) -> dict[str, str]:
    shown = {name: value for name, value in session.items() if value is not None and name != "step"}
    if isinstance(seconds := shown.get("time"), int | float):
        shown["time"] = moment(seconds)
    return {name.replace("_gb", " in GB").replace("_", " "): str(value) for name, value in shown.items()}


def checkpoints(runs: Sequence[Run]) -> str:
    """Those that are there, with what their state says."""
    rows = [
        [
            *([run.name] if len(runs) > 1 else []),
            f"{checkpoint.step:,}",
            _number(checkpoint.state.tokens_seen, 0),
            _number(checkpoint.state.loss, 4),
            _number(checkpoint.state.val_loss, 4),
            f"{checkpoint.n_bytes / 1e6:,.1f} MB",
            moment(checkpoint.path.stat().st_mtime),
        ]
        for run in runs
        for checkpoint in run.checkpoints
    ]
    if not rows:
        return ""
    columns = ["run"] * (len(runs) > 1) + ["step", "tokens", "loss", "validation loss", "size", "written"]
    first = columns.index("step")
    note = '<p class="note">Their files have the sizes that their manifests say. No checksum was computed for this.</p>'
    return section("Checkpoints", table("Checkpoints", columns, rows, numbers=range(first, len(columns))), note)


def events(runs: Sequence[Run]) -> str:
    """The newest events of all runs, in order of time."""
    pairs = [(event, run) for run in runs for event in run.events]
    pairs.sort(key=lambda pair: pair[0]["time"] if isinstance(pair[0].get("time"), int | float) else 0)
    rows = [
        [
            moment(event["time"]) if isinstance(event.get("time"), int | float) else NONE,
            *([run.name] if len(runs) > 1 else []),
            f"{event['step']:,}",
            event["kind"],
            _words(event),
        ]
        for event, run in pairs[-MOST_EVENTS:]
    ]
    if not rows:
        return ""
    columns = ["time", *(["run"] if len(runs) > 1 else []), "step", "event", "details"]
    title = f"The last {MOST_EVENTS} of {len(pairs):,} events" if len(pairs) > MOST_EVENTS else f"{len(pairs)} events"
    shown = table("Events", columns, rows, numbers=[columns.index("step")], unbroken=[0, columns.index("event")])
    return section("Events", details(title, shown, is_open=len(rows) <= 12))


def _words(event: Mapping[str, Any]) -> str:
    known = {name: value for name, value in event.items() if name not in ("time", "step", "kind")}
    shown = flat({name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in known.items()})
    words = ", ".join(f"{name} {value}" for name, value in shown.items())
    return words if len(words) <= 300 else f"{words[:297]}..."
