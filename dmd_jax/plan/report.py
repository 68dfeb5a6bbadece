"""A plan in words; what is derived from compiled and counted figures is derived here."""

import itertools
import re
import resource
from typing import NamedTuple

import jax
import numpy as np

from dmd_jax.experiment import build
from dmd_jax.plan import hlo, machines

SOURCES = (  # (what jax calls a collective, what it is in words); the first that fits
    ("shard_map.*all_gather", "parameters gathered"),
    ("shard_map.*reduce_scatter", "gradients scattered"),
    ("shard_map.*psum", "gradients and metrics averaged"),
    ("reduce_sum", "norms of gradients"),
    ("", "joined or put in by the compiler"),
)


class Plan(NamedTuple):
    """A step, compiled; sizes are bytes on each chip.

    Attributes:
      mesh: of the devices.
      batch: rows of each stream, over all devices.
      accumulation: pieces of a chip's share.
      state: {part: bytes} between steps, counted.
      parameters: of one network, counted.
      seconds: {"tracing", "lowering", "compiling": seconds}.
      memory: {part: bytes} while a step runs, compiled; only "total" if it does not fit.
      fits: whether the memory is enough; None if that is not known.
      operations: of convolutions and matrix products, counted.
      compiled_operations: of all, by the compiler, with what its loops repeat; None where it does
        not say.
      accessed: bytes read and written, likewise.
      collectives: of the program.
    """

    mesh: jax.sharding.Mesh
    batch: dict[str, int]
    accumulation: int
    state: dict[str, int]
    parameters: int
    seconds: dict[str, float]
    memory: dict[str, float]
    fits: bool | None
    operations: int
    compiled_operations: float | None = None
    accessed: float | None = None
    collectives: tuple[hlo.Collective, ...] = ()


def describe(stage: build.Stage, machine: machines.Target, plan: Plan) -> str:
    """All that is known of a step."""
    chips, mesh = plan.mesh.size, " x ".join(f"{axis}={n}" for axis, n in plan.mesh.shape.items())
    batch = " + ".join(f"{size} {name}" for name, size in plan.batch.items())
    pieces = " + ".join(str(size // chips // plan.accumulation) for size in plan.batch.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = [
        "",
        f"{stage.name}: {plan.parameters:,} parameters; batch {batch}, accumulation "
        f"{plan.accumulation}: {pieces} at a time on each of {chips}",
        f"mesh {mesh}",
        ", ".join(f"{what} {s:.1f} s" for what, s in plan.seconds.items())
        + f", at most {gib(peak)} GiB of this machine's memory",
        "",
        "on each chip, in GiB:",
        f"  memory, compiled: {fit(plan, machine)}",
        *(f"    {gib(size):>9} {part}" for part, size in plan.memory.items() if part != "total"),
        f"  state between steps, counted: {gib(sum(plan.state.values()))}",
        *(f"    {gib(size):>9} {part}" for part, size in plan.state.items()),
    ]
    if plan.collectives or plan.fits is not False:
        lines += _work(plan) + _sent(plan) + _bound(stage, machine, plan)
    return "\n".join(lines)


def fit(plan: Plan, machine: machines.Target) -> str:
    """The memory of a step against the machine's."""
    needed = plan.memory["total"]
    if machine.capacity is None:
        return gib(needed)
    left = machine.capacity - needed
    verdict = f"{gib(left)} are left" if plan.fits else f"does not fit, {gib(-left)} too much"
    return f"{gib(needed)} of {gib(machine.capacity)}, {verdict}"


def flags(overrides: dict) -> str:
    """Settings as they are given to main."""
    return " ".join(f"--config.{key}={value}" for key, value in overrides.items())


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.4g}"


def _work(plan):
    lines = [
        "",
        f"a step, on each chip: {plan.operations / 1e12:.4g} TFLOP in convolutions and matrix "
        "products, counted",
    ]
    if plan.compiled_operations:
        lines.append(
            f"  {plan.compiled_operations / 1e12:.4g} TFLOP in all, compiled, and the rounds of "
            "loops after the first, counted"
        )
    if plan.accessed:
        lines.append(
            f"  {plan.accessed / 1e9:.4g} GB accessed, compiled; loops repeated in proportion to "
            "what their text moves, derived"
        )
    return lines


def _sent(plan):
    """The table of collectives, counted in the compiled program."""
    rows = {}
    for c in plan.collectives:
        what = next(words for pattern, words in SOURCES if re.search(pattern, c.source))
        row = rows.setdefault(
            (c.kind, axis(c.groups, plan.mesh), max(map(len, c.groups)), what), [0, 0, 0]
        )
        row[:] = row[0] + c.count, row[1] + c.count * c.size, row[2] + c.sent
    lines = [
        "",
        "collectives of a step, counted in the compiled program; whole arrays, and what each chip "
        "sends, in MB",
    ]
    if not rows:
        return [*lines, "  none"]
    lines.append(
        f"  {'kind':<20}{'axis':<7}{'among':>6}{'times':>7}{'arrays':>11}{'sent':>11}  what"
    )
    for (kind, name, among, what), (count, size, sent) in sorted(
        rows.items(), key=lambda row: -row[1][2]
    ):
        lines.append(
            f"  {kind:<20}{name:<7}{among:>6}{count:>7}{size / 1e6:>11.3f}{sent / 1e6:>11.3f}  "
            f"{what}"
        )
    total = sum(c.sent for c in plan.collectives)
    whole = 4 * plan.parameters
    share = f"the parameters of one network are {whole / 1e6:.3f} MB in float32: "
    share += f"{total / whole:.2f} times"
    return [*lines, f"  each chip sends {total / 1e6:.3f} MB; {share}"]


def axis(groups: frozenset, mesh: jax.sharding.Mesh) -> str:
    """Returns the axis of the mesh along which devices exchange: its name, "all" or "other"."""
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    names = [name for name, n in mesh.shape.items() if n > 1]
    for taken in itertools.chain.from_iterable(
        itertools.combinations(names, n) for n in range(1, len(names) + 1)
    ):
        axes = [list(mesh.shape).index(name) for name in taken]
        expected = np.moveaxis(places, axes, range(-len(axes), 0)).reshape(
            -1, int(np.prod([mesh.shape[name] for name in taken]))
        )
        if {frozenset(group) for group in groups} == {
            frozenset(group) for group in expected.tolist()
        }:
            return taken[0] if len(taken) == 1 else "all"
    return "other"


def bounds(plan: Plan, machine: machines.Target) -> dict[str, float]:
    """Derives the least seconds of a step, for each of the chip's limits that is known."""
    chip = machine.chip
    if not chip:
        return {}
    found = {
        "computing": plan.operations / chip.flops,
        "links": sum(c.sent for c in plan.collectives) / chip.links,
    }
    return found | ({"memory": plan.accessed / chip.bandwidth} if plan.accessed else {})


def _bound(stage, machine, plan):
    found = bounds(plan, machine)
    if not found:
        return ["", "no bound of the seconds of a step: peaks of this machine are not known"]
    limit = max(found, key=found.get)
    seconds = found[limit]
    before = stage.settings.continues
    steps = stage.settings.num_steps
    steps -= stage.stages[before].settings.num_steps if before else 0
    chips = plan.mesh.size
    rows = sum(plan.batch.values()) / seconds
    hours = steps * seconds / 3600
    each = ", ".join(f"{what} {s:.3g}" for what, s in found.items())
    length = f"{hours:.3g} hours, {hours * chips:.3g} chip-hours"
    return [
        "",
        "no step is faster than these figures at the chip's published peaks, in seconds, derived: "
        f"{each}; bound by {limit}",
        f"at that bound {rows:.0f} rows/s; {steps:,} steps of {stage.name} in {length}; the other "
        "stages are not in it",
    ]
