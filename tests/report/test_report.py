"""`rwkv-cluster report`: a run that was stopped, killed and continued, and directories in every state."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from report_page import Page, records
from system.processes import Job
from tiny_run import tiny_run_config, write_config

from rwkv_cluster import cli
from rwkv_cluster.config.loader import dump_yaml, load_config
from rwkv_cluster.errors import Preempted
from rwkv_cluster.train.distributed.collectives import FAULT_VARIABLE
from rwkv_cluster.train.run import train
from rwkv_cluster.train.schedule import learning_rate

pytestmark = pytest.mark.system  # a run that is stopped, killed and continued


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 steps with checkpoints of 4 and 8: stopped after step 3, killed at step 6, continued from 3 and from 4."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_run_config(folder, training={"max_steps": 10, "val_interval_steps": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAULT_VARIABLE, "train.step@2:signal=SIGUSR1")
        with pytest.raises(Preempted):
            train(config)
    write_config(folder / "run.yaml", config)
    killed = Job(folder, fault="train.step@6:signal=SIGKILL")
    assert killed.wait() == -9, killed.text
    train(config)
    return folder / "work"


@pytest.fixture
def work(trained: Path, tmp_path: Path) -> Path:
    """A copy, to change."""
    return Path(shutil.copytree(trained, tmp_path / "work"))


def report(work: Path) -> Page:
    assert cli.main(["report", str(work)]) == 0
    return Page(work / "report" / "index.html")


@pytest.fixture(scope="module")
def page(trained: Path) -> Page:
    return report(trained)


def test_the_numbers_in_the_page_are_those_of_the_metrics(page: Page, trained: Path) -> None:
    lines = records(trained)
    assert [line["step"] for line in lines] == list(range(1, 11))
    for name in ("loss", "lr", "grad_norm", "tokens_per_s", "memory_mb"):
        found = page.series(name)
        assert found["step"] == [line["step"] for line in lines]
        assert found["tokens"] == [line["tokens"] for line in lines]
        assert found["value"] == [line[name] for line in lines]
        assert found["n_records"] == 10
    evaluated = [line for line in lines if "val_loss" in line]
    assert page.series("val_loss")["step"] == [line["step"] for line in evaluated] == [4, 8, 10]
    assert page.series("val_loss")["value"] == [line["val_loss"] for line in evaluated]
    assert page.series("loss_smoothed")["value"][0] == lines[0]["loss"]


def test_the_learning_rates_to_come(page: Page, work: Path) -> None:
    """Those of the schedule, from the last recorded step to the end that the configuration says."""
    assert "lr_planned" not in page.numbers["runs"][0]["series"]  # it is at its end
    config = load_config(work / "configs" / "config.yaml", ["--training.max_steps=20"])
    (work / "configs" / "config.yaml").write_text(dump_yaml(config))
    longer = report(work).series("lr_planned")
    per_step = records(work)[0]["tokens"]
    assert longer["step"] == list(range(10, 21))
    assert longer["tokens"] == [step * per_step for step in longer["step"]]
    assert longer["value"] == [
        learning_rate(step - 1, training=config.training, tokens_per_step=per_step, horizon_tokens=20 * per_step)
        for step in longer["step"]
    ]


def test_the_curve_lies_where_the_numbers_say(page: Page) -> None:
    (figure,) = re.findall(r'<figure[^>]*id="chart-loss">.*?</figure>', page.source, re.DOTALL)
    paths = [re.findall(r"[ML] (\S+) (\S+)", path) for path in re.findall(r'd="(M [^"]*)"', figure)]
    drawn = np.array(next(path for path in paths if len(path) == 10), float)
    loss = page.series("loss")
    for place, values in ((0, loss["tokens"]), (1, loss["value"])):
        slope, start = np.polyfit(values, drawn[:, place], 1)
        assert np.abs(slope * np.array(values) + start - drawn[:, place]).max() < 0.01
        assert slope > 0 if place == 0 else slope < 0  # downwards in an SVG


def test_resumes_are_marked(page: Page, trained: Path) -> None:
    events = [(event["kind"], event["step"]) for event in page.numbers["runs"][0]["events"]]
    assert [step for kind, step in events if kind == "resume"] == [3, 4]
    assert "resumed (2)" in page.text
    assert "stopped" not in re.findall(r'<ul class="legend">.*?</ul>', page.source, re.DOTALL)[0]  # it went on
    assert "Sessions3" in page.text
    lines = records(trained, "events.jsonl")
    assert len(page.numbers["runs"][0]["events"]) == len(lines)


def test_parts_of_a_step_are_those_of_the_ranks(work: Path) -> None:
    lines = records(work, "events/rank-0.jsonl")
    slower = [{**line, "backward_s": line["backward_s"] + 1} for line in lines]
    text = "".join(json.dumps(line) + "\n" for line in slower)
    (work / "logs" / "events" / "rank-1.jsonl").write_text(text)
    page = report(work)
    found = page.series("step_parts")
    assert (found["step"], found["steps_each"]) == (list(range(1, 11)), 1)
    assert found["data_s"] == pytest.approx([line["data_s"] for line in lines])
    assert found["backward_s"] == pytest.approx([line["backward_s"] + 0.5 for line in lines])
    total = sum(line["backward_s"] for line in slower)
    assert f"{total:,.1f} (rank 1)" in page.text


def test_the_page_stands_alone(page: Page) -> None:
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert not page.tags & {"img", "link", "iframe", "object", "foreignobject"}
    assert "default-src 'none'" in page.source
    assert "@import" not in page.source
    assert not re.search(r"url\((?!#)", page.source)
    assert len(set(page.ids)) == len(page.ids)
    names = {reference[1:] for reference in page.references} | set(re.findall(r"url\(#([^)]*)\)", page.source))
    assert names <= set(page.ids)
    assert "prefers-color-scheme: dark" in page.source
    assert not re.search(r"(fill|stroke): #", page.source)  # every color follows the scheme


def test_tables_say_what_the_run_was(page: Page, trained: Path) -> None:
    text = page.text
    manifest = json.loads((trained / "data" / "manifest.json").read_text())
    (session,) = json.loads((trained / "logs" / "environment.json").read_text())["sessions"]
    for expected in (
        "training.max_steps10",
        f"{manifest['n_tokens']:,}",
        manifest["files"]["train.bin"]["sha256"][:16],
        session["torch"],
        session["host"],
        "files have the sizes",
        "10of 10",
    ):
        assert expected in text
    assert "Not shown" not in text


def test_pictures_in_both_schemes(page: Page, trained: Path) -> None:
    for name in ("loss", "lr", "grad_norm", "tokens_per_s", "memory_mb", "step_parts"):
        light, dark = ((trained / "report" / f"{name}{suffix}.png").read_bytes() for suffix in ("", "-dark"))
        assert light.startswith(b"\x89PNG")
        assert light != dark


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' $x_$ & \\u003c"


def test_hostile_text_is_text(work: Path, tmp_path: Path) -> None:
    place = work.rename(tmp_path / 'a<b onload="x">&$y_$')
    config = load_config(place / "configs" / "config.yaml")
    changed = config.model_copy(update={"logging": config.logging.model_copy(update={"sample_prompt": HOSTILE})})
    (place / "configs" / "config.yaml").write_text(dump_yaml(changed))
    with open(place / "logs" / "events.jsonl", "a") as handle:
        handle.write(json.dumps({"time": 1.0, "step": 10, "kind": "stop", "reason": HOSTILE}) + "\n")
        handle.write(json.dumps({"time": "x", "step": 10, "kind": HOSTILE, "what": "\x00\x1b[31m\ud800"}) + "\n")
        handle.write(json.dumps({"time": 1e300, "step": True, "kind": []}) + "\n[]\n")
    environment = {"sessions": [{"host": HOSTILE, HOSTILE: 1, "time": 1e300}, "x"]}
    (place / "logs" / "environment.json").write_text(json.dumps(environment))
    page = report(place)
    assert not page.tags & {"img", "b"}
    assert len(page.scripts) == 1
    assert page.text.count(HOSTILE) == 5  # prompt, also as no default; host, reason and kind
    assert page.numbers["runs"][0]["name"] == place.name
    assert page.numbers["runs"][0]["events"][-1]["kind"] == HOSTILE


def test_a_notebooks_backend_that_is_not_here_is_not_asked_for(work: Path, tmp_path: Path) -> None:
    """A command in a notebook inherits MPLBACKEND, and matplotlib's import fails by one that it does not know."""
    command = [sys.executable, "-m", "rwkv_cluster", "report", str(work), "--output", str(tmp_path / "page")]
    environment = os.environ | {"MPLBACKEND": "module://nowhere"}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=100)
    assert (tmp_path / "page" / "index.html").exists()
