"""Writes what a run reports: metrics.jsonl, TensorBoard events, a progress bar and pictures.

Only the first process writes.
"""

import contextlib
import json
import os
import sys
import time

import jax
import numpy as np
import tqdm
from absl import logging
from PIL import Image

from dmd_jax.runtime import storage


class Writer:
    """Writes the metrics of one stage, and shows its progress."""

    def __init__(self, directory: str | os.PathLike, *, name: str, start: int, num_steps: int):
        self._name, self._num_steps = name, num_steps
        self._active = jax.process_index() == 0
        if self._active:
            self._files = storage.Growing(directory)
            path = self._files.path / "metrics.jsonl"
            # Rows of steps that are about to be redone are dropped.
            kept = [row for row in read(directory) if row["step"] <= start]
            with storage.writing(path) as new:
                new.write_text("".join(json.dumps(row) + "\n" for row in kept))
            self._file = path.open("a")
            self._events = _Events(self._files.path / "events", start + 1)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            desc=name,
            initial=start,
            total=num_steps,
            unit="step",
            disable=not (self._active and self._terminal),
        )

    def write(self, step: int, values: dict[str, float]):
        """Records scalars under `step`."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.scalar(step, name, value)
        self._events.flush()
        self._files.grown()
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._terminal:
            self._bar.set_postfix_str(text)
        else:
            say(f"{self._name} {step}/{self._num_steps}: {text}")

    def write_picture(self, step: int, picture: np.ndarray):
        """Writes samples/<step>.png from a picture [H, W, 3] of bytes."""
        if self._active:
            path = self._files.path / "samples" / f"{step:07d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(path)
            self._events.picture(step, "samples", picture)
            self._events.flush()

    def advance(self, step: int):
        """Moves the progress bar to `step`."""
        self._bar.update(step - self._bar.n)

    def note(self, text: str):
        """Shows a line."""
        if self._active:
            with contextlib.suppress(OSError):
                tqdm.tqdm.write(f"{self._name}: {text}", file=sys.stderr)

    def flush(self):
        """Puts everything where it is safe."""
        if self._active:
            self._files.flush()

    def close(self):
        self._bar.close()
        if self._active:
            self._file.close()
            self._events.close()
            self._files.close()


def say(text: str, *, error: bool = False):
    """Prints a line; a run goes on, and ends as it should, where nobody can read it any more."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


class _Events:
    """The events of TensorBoard, which forgets those of the first step and later ones."""

    def __init__(self, path, first):
        # Here, because it takes more than a second where PyTorch is installed.
        import tensorboardX

        self._summary = tensorboardX.summary
        self._proto = tensorboardX.proto.event_pb2
        # Not SummaryWriter: its thread dies on a full disk, and its queue then waits for ever.
        self._writer = tensorboardX.event_file_writer.EventsWriter(str(path))
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._writer.write_event(self._proto.Event(step=first, session_log=start))

    def scalar(self, step, name, value):
        self._write(step, self._summary.scalar(name, value))

    def picture(self, step, name, picture):
        self._write(step, self._summary.image(name, picture, dataformats="HWC"))

    def _write(self, step, summary):
        event = self._proto.Event(wall_time=time.time(), step=step, summary=summary)
        self._writer.write_event(event)

    def flush(self):
        self._writer.flush()

    def close(self):
        self._writer.close()


def read(directory: str | os.PathLike) -> list[dict]:
    """The rows of a stage's metrics.jsonl.

    A last line cut short by a crash is left out; so are damaged lines, with a warning.
    """
    path = storage.path(directory) / "metrics.jsonl"
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    rows = []
    damaged = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
        else:
            damaged.append(number)
    if damaged:
        logging.warning("%s: lines %s are damaged, and left out.", path, damaged)
    return rows


def seconds(directory: str | os.PathLike) -> float | None:
    """Returns how long the steps of a stage took, without compiling, by its metrics.jsonl.

    It is None where there are no speeds.
    """
    rows = [row for row in read(directory) if "steps_per_second" in row]
    if not rows:
        return None
    starts = [0, *(row["step"] for row in rows[:-1])]
    return sum(
        (row["step"] - start) / row["steps_per_second"]
        for start, row in zip(starts, rows, strict=True)
    )
