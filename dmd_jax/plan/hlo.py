"""What a compiled program moves, read from the text that XLA gives of it.

An instruction in the body of a loop counts as often as the loop runs, and one that is split into a
start and a done counts once. With S the bytes of the whole array, before it is scattered or after
it is gathered, each of n devices sends at least

    all-gather, reduce-scatter, all-to-all    S (n - 1) / n
    all-reduce                                2 S (n - 1) / n
    collective-permute                        S

as rings do (Patarasuk & Yuan, J. Parallel Distrib. Comput. 69, 2009).
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
    r"|branch_computations=\{(.*?)\}"
)
CONTROL = ("while", "call", "conditional")
NO_TRAFFIC = (
    *CONTROL,
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
)


class Instruction(NamedTuple):
    """A line of the program: `name = type opcode(operands), attributes`.

    A constant has its value in the place of operands.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    value: str
    attributes: str


class Collective(NamedTuple):
    """Devices that exchange arrays.

    Attributes:
      kind: one of `KINDS`.
      groups: of devices that exchange with one another, by their places in the mesh; pairs for
        collective-permute.
      size: bytes of the whole arrays.
      count: how often a run of the program does it.
      source: where it comes from, as jax names it; empty where the compiler has put it in or
        joined several.
    """

    kind: str
    groups: frozenset[tuple[int, ...]]
    size: int
    count: int
    source: str

    @property
    def sent(self) -> float:
        """Bytes that each device sends, all runs together."""
        n = max(map(len, self.groups))
        return (
            self.count
            * self.size
            * {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(self.kind, (n - 1) / n)
        )


def collectives(text: str) -> list[Collective]:
    """The collectives of a program, as `compiled.as_text()` has it.

    Raises:
      ValueError: it cannot be told how often one of them runs, or among which devices.
    """
    devices = (
        int(found[1])
        if (found := re.search(r"num_partitions=(\d+)", text.partition("\n")[0]))
        else 1
    )
    computations, result = _parse(text), []
    for computation, count in _calls(computations):
        for instruction in computations[computation]:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if count is None:
                raise ValueError(f"cannot tell how often the loop around {instruction.name} runs.")
            groups = _groups(instruction, devices)
            n = max(map(len, groups))
            size = _bytes(_result(instruction)) * (n if kind == "reduce-scatter" else 1)
            source = (
                found[1] if (found := re.search(r'op_name="(.*?)"', instruction.attributes)) else ""
            )
            if n > 1:
                result.append(Collective(kind, groups, size, count, source))
    return result


def repetition(text: str) -> float:
    """Returns the ratio of bytes read and written with loops counted fully, and counted once."""
    computations, once, repeated = _parse(text), 0, 0
    for computation, count in _calls(computations, CONTROL):
        sizes = {i.name: _bytes(i.type) for i in computations[computation]}
        for i in computations[computation]:
            if i.opcode not in NO_TRAFFIC and not i.opcode.endswith("-done"):
                moved = sizes[i.name] + sum(sizes.get(operand, 0) for operand in i.operands)
                once += moved
                repeated += moved * (count or 1)
    return repeated / max(once, 1)


def _parse(text):
    """{computation: its instructions}, that of the program under ""."""
    computations, current = {}, None
    for line in text.splitlines():
        if found := INSTRUCTION.match(line):
            current.append(_instruction(found[1], found[2]))
        elif (found := HEADER.match(line)) and not line.startswith("HloModule"):
            current = computations["" if found[1] else found[2]] = []
    return computations


def _instruction(name, text):
    end = _closing(text) if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].lstrip().partition("(")
    close = _closing(f"({rest}") - 1
    return Instruction(
        name,
        text[:end],
        opcode,
        tuple(re.findall(r"%([\w.-]+)", rest[:close])),
        rest[: close - 1],
        rest[close:],
    )


def _closing(text):
    """Behind the parenthesis that closes the first one."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    raise ValueError(f"unbalanced: {text[:100]}")


def _calls(computations, opcodes=None, name="", times=1) -> Iterator[tuple[str, int | None]]:
    """Yields each computation, once for each place that calls it, with how often it runs.

    It is None where that is unknown. Only what `opcodes` call counts, if they are given.
    """
    yield name, times
    for i in computations[name]:
        if opcodes and i.opcode not in opcodes:
            continue
        trips = _trips(i, computations) if i.opcode == "while" else 1
        for single, several in CALLED.findall(i.attributes):
            for called in [single] if single else re.findall(r"[\w.-]+", several):
                yield from _calls(computations, opcodes, called, times and trips and times * trips)


def _trips(loop, computations):
    """Returns how often a loop runs, as the compiler says or by the constant of its condition."""
    if found := re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes):
        return int(found[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.attributes)[1]
    inside = [i for name, _ in _calls(computations, None, condition) for i in computations[name]]
    limits = [
        int(i.value) for i in inside if i.opcode == "constant" and re.match(r"[su]32\[\]", i.type)
    ]
    return (
        limits[0]
        if len(limits) == 1 and any("direction=LT" in i.attributes for i in inside)
        else None
    )


def _result(i):
    """The type of what a collective makes; one that starts here has its operands beside it."""
    if not i.opcode.endswith("-start") or i.opcode == "all-reduce-start":
        return i.type
    parts, rest = [], i.type[1:-1]
    while rest:
        end = _closing(rest) if rest.startswith("(") else (re.search(r"\](\{.*?\})?", rest)).end()
        parts.append(rest[:end])
        rest = re.sub(r"^(,? *(/\*.*?\*/)?)*", "", rest[end:])
    return parts[1]


def _bytes(type):
    """Returns the bytes of all arrays of a type; a boolean takes a byte."""
    total = 0
    for dtype, shape in ARRAY.findall(type):
        bits = re.search(r"\d+", dtype)
        total += math.prod(map(int, filter(None, shape.split(",")))) * (
            int(bits[0]) if bits else 8 * (dtype == "pred")
        )
    return total // 8


def _groups(i, devices):
    """Which devices exchange with one another, in any of the four ways in which XLA writes it."""
    numbers = lambda text: [int(n) for n in re.findall(r"\d+", text)]
    a = i.attributes
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", a):
        groups = [numbers(group) for group in re.findall(r"\{(.*?)\}", found[1])] or [
            range(devices)
        ]
    elif found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", a):
        groups = _tiles(numbers(found[2]), numbers(found[3] or "")).reshape(numbers(found[1]))
    elif found := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
        r"\{(['\w,]*)\}",
        a,
    ):
        axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        taken = re.findall(r"'(\w+)'", found[4])
        ids = _tiles(
            numbers(found[2] or str(math.prod(axes.values()))), numbers(found[3] or "")
        ).reshape(list(axes.values()))
        order = [k for k, name in enumerate(axes) if name not in taken] + [
            list(axes).index(name) for name in taken
        ]
        groups = ids.transpose(order).reshape(-1, math.prod(axes[name] for name in taken))
    else:
        raise ValueError(f"cannot read the groups of {i.name}: {a[:200]}")
    return frozenset(tuple(int(n) for n in group) for group in groups)


def _tiles(shape, order):
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(order).ravel() if order else ids.ravel()
