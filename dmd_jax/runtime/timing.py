"""How time and memory are measured and printed."""

import resource
import statistics
import time
from collections.abc import Callable, Sequence

import jax


def timed(function: Callable) -> tuple:
    """Returns the seconds that a call takes, and its result."""
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def in_turn(functions: Sequence[Callable], repeats: int) -> list[list[float]]:
    """Times the functions one after another, `repeats` times over.

    A machine that is slow for a while slows all of them.

    Returns:
      The seconds of the calls of each function.
    """
    rows = [[timed(function)[0] for function in functions] for _ in range(repeats)]
    return [list(column) for column in zip(*rows, strict=True)]


def median_seconds(function: Callable, repeats: int) -> float:
    """Returns the median seconds of `repeats` calls of a function that is compiled already."""
    return statistics.median(in_turn([function], repeats)[0])


def spread(values: list[float]) -> str:
    """Writes median, minimum and maximum."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def devices() -> str:
    """Names the devices."""
    return f"device: {jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"


def peak_memory() -> str:
    """Returns the peak memory of the device, or of the process if the device does not report it."""
    stats = jax.devices()[0].memory_stats() or {}
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"{stats.get('peak_bytes_in_use', of_process) / 2**30:.1f} GiB"
