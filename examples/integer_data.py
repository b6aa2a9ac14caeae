"""Small data of three kinds of integer sequences, for the recipes in configs/integers: codec tokens, events, a series.

    python examples/integer_data.py data       # data/codec.npy, data/events.jsonl, data/series.npy

Each is made up, and has something to learn: a tone goes on, a scale goes up and down, a day looks like the day before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

STAGES, LEVELS = 4, 16
NOTE_ON, NOTE_OFF, WAIT = 0, 128, 256  # the first value of each kind of event


def codec_tokens(rng: np.random.Generator, clips: int = 200, frames: int = 128) -> NDArray[np.uint16]:
    """Clips of two tones as a residual quantiser of four stages writes them, a row a clip: [clips, frames * STAGES].

    Each stage says in LEVELS steps what the stages before it have left; its values are its own: stage * LEVELS + level.
    """
    time = np.arange(frames)
    pitch = rng.uniform(0.02, 0.2, size=(clips, 2, 1))
    rest = np.sin(2 * np.pi * pitch * time + rng.uniform(0, 6.28, size=(clips, 2, 1))).mean(axis=1)  # [clips, frames]
    tokens = np.empty((clips, frames, STAGES), np.uint16)
    width = 2.0
    for stage in range(STAGES):
        level = np.clip(np.floor((rest / width + 0.5) * LEVELS), 0, LEVELS - 1)
        rest = rest - ((level + 0.5) / LEVELS - 0.5) * width
        width /= LEVELS
        tokens[:, :, stage] = stage * LEVELS + level
    return tokens.reshape(clips, -1)


def events(rng: np.random.Generator, pieces: int = 200) -> list[list[int]]:
    """Pieces of music as events of MIDI: a note begins, some time passes, the note ends."""
    scale = np.array([0, 2, 4, 5, 7, 9, 11, 12])
    music = []
    for _ in range(pieces):
        steps = np.concatenate([np.arange(8), np.arange(6, -1, -1)] * int(rng.integers(2, 6)))
        notes = int(rng.integers(40, 80)) + scale[steps]
        duration = WAIT + int(rng.integers(5, 50))
        music.append([event for note in notes.tolist() for event in (NOTE_ON + note, duration, NOTE_OFF + note)])
    return music


def series(rng: np.random.Generator, days: int = 400, bins: int = 256) -> NDArray[np.uint8]:
    """Load of a power grid by the quarter of an hour, in bins of equal width: a day, a week, and noise."""
    quarter = np.arange(days * 96)
    daily = np.sin(2 * np.pi * quarter / 96 - 2) + 0.4 * np.sin(4 * np.pi * quarter / 96)
    weekly = np.where(quarter // 96 % 7 >= 5, -0.5, 0.0)
    load = daily + weekly + rng.normal(0, 0.05, len(quarter))
    share = (load - load.min()) / (load.max() - load.min())
    return np.minimum(share * bins, bins - 1).astype(np.uint8)


def main(folder: Path) -> None:
    """Write the three files below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    np.save(folder / "codec.npy", codec_tokens(rng))
    (folder / "events.jsonl").write_text("".join(json.dumps({"events": piece}) + "\n" for piece in events(rng)))
    np.save(folder / "series.npy", series(rng).astype(np.uint16))  # uint8 would be bytes of text


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
