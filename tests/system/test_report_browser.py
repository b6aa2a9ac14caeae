"""A report in a real browser: Chromium draws it in light and in dark and finds in it what was put there."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from report_page import records
from tiny_run import tiny_run_config

from rwkv_cluster import cli
from rwkv_cluster.train.run import train

pytestmark = pytest.mark.system

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCHEMES = {"dark": 0, "light": 1}  # Blink's numbers


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if CHROMIUM is None:
        message = "Chromium is not installed (apt-get install chromium)"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    folder = tmp_path_factory.mktemp("run")
    train(tiny_run_config(folder))
    assert cli.main(["report", str(folder / "work")]) == 0
    return folder / "work" / "report" / "index.html"


def chromium(page: Path, *arguments: str) -> str:
    """What the browser prints about `page`. It may load this file and nothing else."""
    assert CHROMIUM is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
    options += [f"--user-data-dir={page.parent / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command = [CHROMIUM, *options, *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "Content Security Policy" not in done.stderr
    return done.stdout


def screenshot(page: Path, scheme: str, width: int) -> np.ndarray:
    """(height, width, 3), from 0 to 1. The browser's windows are at least 500 pixels wide, a frame in one is not."""
    picture, frame = page.with_name(f"{scheme}-{width}.png"), page.with_name(f"frame-{width}.html")
    frame.write_text(f'<body style="margin:0"><iframe src="index.html" style="border:0;width:{width}px;height:1500px">')
    setting = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    chromium(frame, setting, "--window-size=1280,1500", f"--screenshot={picture}")
    return np.asarray(image.imread(picture))[:, :width, :3]


@pytest.mark.parametrize("width", [1280, 400])
def test_light_and_dark_are_both_drawn(page: Path, width: int) -> None:
    light, dark = (screenshot(page, scheme, width) for scheme in ("light", "dark"))
    assert light.shape == dark.shape == (1500, width, 3)
    for shot in (light, dark):
        colors = np.unique((shot * 255).astype(np.uint8).reshape(-1, 3), axis=0)
        assert len(colors) > 200  # text and curves, smoothed at their edges
        assert (np.ptp(shot, axis=2) > 0.3).sum() > 500  # of a color, as curves are
        inked = np.abs(shot - shot[2, 2]).max(axis=2) > 0.2
        assert inked[:, : width // 2].any(axis=1).mean() > 0.25
        assert not inked[:, -6:].any()  # nothing runs out of the page
    assert np.median(light) > 0.95
    assert np.median(dark) < 0.15


def test_the_browser_finds_the_plotted_numbers(page: Path) -> None:
    dom = chromium(page, "--dump-dom")
    (script,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', dom, re.DOTALL)
    (run,) = json.loads(script)["runs"]
    lines = records(page.parents[1])
    assert run["series"]["loss"]["value"] == [line["loss"] for line in lines]
    figures = re.findall(r'<figure[^>]*id="chart-([^"]*)"', dom)
    assert figures == ["loss", "lr", "grad_norm", "tokens_per_s", "memory_mb", "step_parts"]
    assert f"of {len(lines)}" in html.unescape(dom)
