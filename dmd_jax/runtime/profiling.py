"""Traces of some steps of a run, for XProf: `pip install xprof`, then `xprof --logdir=DIRECTORY`."""

import contextlib
import os
import re

import jax

from dmd_jax.runtime import storage


class Trace:
    """Writes a trace of the steps "first:last" of a run, counted from where it started; None for none.

    Raises:
      ValueError: `steps` is something else.
    """

    def __init__(self, steps: str | None, directory: str | os.PathLike):
        first, last = (0, 0) if steps is None else parse(steps)
        self._first, self._last, self._directory, self._files = first, last, directory, None

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """Around the dispatch of the step that is the `number`-th of the run."""
        if number == self._first:
            self._files = storage.Growing(self._directory)
            jax.profiler.start_trace(self._files.path)
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def finish(self, number: int, values):
        """After that step; waits for its `values` where the trace ends."""
        if self._files and number >= self._last:
            jax.block_until_ready(values)
            jax.profiler.stop_trace()
            self._files.close()
            self._files = None


def parse(steps: str) -> tuple[int, int]:
    """ "10:20" as numbers."""
    found = re.fullmatch(r"(\d+):(\d+)", steps)
    first, last = (int(n) for n in found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            f"profile is {steps!r}, expected the first and the last step to trace, such as 10:20."
        )
    return first, last
