"""Collectives of programs whose collectives are known."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dmd_jax import sharding
from dmd_jax.plan import hlo, machines, report

ROWS, COLUMNS = 64, 256
BYTES = 4 * ROWS * COLUMNS


def repeat(function, times):
    return lambda x: jax.lax.scan(lambda x, _: (function(x), None), x, None, length=times)[0]


def mean(axis):
    return lambda x: jax.lax.psum(jnp.tanh(x), axis)


def gathered(x):
    return jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)


def scattered(x):
    return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)


def shifted(x):
    return jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)])


SPLIT, WHOLE = P("fsdp"), P()
# {name: (program of a device, split of its argument, split of its result, collectives)}
# A collective is (kind, axis, bytes of the complete array, count, bytes sent).
PROGRAMS = {
    "all-gather": (gathered, SPLIT, WHOLE, [("all-gather", "fsdp", BYTES, 1, BYTES * 3 / 4)]),
    "reduce-scatter": (
        scattered,
        WHOLE,
        SPLIT,
        [("reduce-scatter", "fsdp", BYTES, 1, BYTES * 3 / 4)],
    ),
    "all-reduce": (mean("data"), WHOLE, WHOLE, [("all-reduce", "data", BYTES, 1, BYTES)]),
    "over all": (
        mean(("data", "fsdp")),
        WHOLE,
        WHOLE,
        [("all-reduce", "all", BYTES, 1, 2 * BYTES * 7 / 8)],
    ),
    "shift": (shifted, SPLIT, SPLIT, [("collective-permute", "other", BYTES / 4, 1, BYTES / 4)]),
    "loop": (
        repeat(mean("fsdp"), 3),
        WHOLE,
        WHOLE,
        [("all-reduce", "fsdp", BYTES, 3, 3 * BYTES * 6 / 4)],
    ),
    "nested loops": (
        repeat(lambda x: repeat(mean("data"), 5)(jnp.sin(x)), 3),
        WHOLE,
        WHOLE,
        [("all-reduce", "data", BYTES, 15, 15 * BYTES)],
    ),
    "none": (jnp.tanh, SPLIT, SPLIT, []),
}


@functools.cache
def mesh(platform):
    if platform == "tpu" and not importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu, the compiler for TPUs, is not installed")
    devices = jax.devices() if platform == "cpu" else machines.find("v5e-8").devices
    return Mesh(np.array(devices).reshape(2, 4), sharding.AXES, axis_types=(AxisType.Auto,) * 2)


def compiled(platform, function, before, after):
    program = jax.shard_map(
        function, mesh=mesh(platform), in_specs=before, out_specs=after, check_vma=False
    )
    x = jax.ShapeDtypeStruct(
        (ROWS, COLUMNS), jnp.float32, sharding=NamedSharding(mesh(platform), before)
    )
    return (
        jax.jit(program, out_shardings=NamedSharding(mesh(platform), after))
        .lower(x)
        .compile()
        .as_text()
    )


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_sent(name, platform):
    function, before, after, expected = PROGRAMS[name]
    found = hlo.collectives(compiled(platform, function, before, after))
    assert [
        (c.kind, report.axis(c.groups, mesh(platform)), c.size, c.count, c.sent) for c in found
    ] == expected


def test_a_loop_that_may_run_for_ever():
    function = lambda x: jax.lax.while_loop(lambda x: x.sum() < 1, mean("data"), x)
    with pytest.raises(ValueError, match="cannot tell how often the loop around"):
        hlo.collectives(compiled("cpu", function, WHOLE, WHOLE))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_traffic_of_a_loop_is_repeated(platform):
    product = lambda x: jnp.tanh(x @ jnp.ones((COLUMNS, COLUMNS)))
    once, repeated = (
        hlo.repetition(compiled(platform, f, WHOLE, WHOLE)) for f in (product, repeat(product, 50))
    )
    assert once == 1 and 15 < repeated <= 50


def line(kind, type, groups):
    return f"""HloModule test, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[2,3]) -> f32[2,3] {{
  %x = f32[2,3]{{1,0:T(8,128)S(1)}} parameter(0)
  %c.1 = {type} {kind}(%x), channel_id=1, {groups}, use_global_device_ids=true, to_apply=%add
}}
"""


PAIRS = {(0, 1), (2, 3), (4, 5), (6, 7)}
EVERY_OTHER = {(0, 2, 4, 6), (1, 3, 5, 7)}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups={}", {tuple(range(8))}),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", PAIRS),
        ("replica_groups=[4,2]<=[8]", PAIRS),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", EVERY_OTHER),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}", {tuple(range(8))}),
        ("replica_groups=mesh['x'=4,'y'=2] {'y'}", PAIRS),
        ("replica_groups=mesh['x'=4,'y'=2] {'x'}", EVERY_OTHER),
        (
            "replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], "
            "device_ids=([4,2]T(1,0)) {'axis_0'}",
            PAIRS,
        ),
        (
            "replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], "
            "device_ids=([4,2]T(1,0)) {'axis_2'}",
            EVERY_OTHER,
        ),
    ],
)
def test_groups(groups, expected):
    (found,) = hlo.collectives(line("all-reduce", "f32[2,3]{1,0:T(8,128)}", groups))
    assert found.groups == expected and found.size == 24


@pytest.mark.parametrize(
    ("kind", "type", "size"),
    [
        ("all-reduce", "(f32[2,3]{1,0:T(8,128)(2,1)}, /*index=1*/bf16[5]{0})", 34),
        ("all-reduce-start", "(pred[2,3], u8[5])", 11),
        ("all-gather-start", "(f32[2,3]{1,0}, f32[4,3]{1,0})", 48),
        ("all-gather-start", "((f32[2,3]{1,0}, s32[]), (f32[4,3]{1,0}, /*index=1*/s32[2]{0}))", 56),
        ("reduce-scatter-start", "((f32[2,3], f32[4,3]), (f32[1,3], f32[2,3]), u32[])", 72),
        ("collective-permute-start", "(f32[2,3]{1,0}, f32[2,3]{1,0}, u32[]{:S(2)}, u32[])", 24),
        ("all-gather-done", "f32[4,3]", None),
    ],
)
def test_sizes(kind, type, size):
    found = hlo.collectives(line(kind, type, "replica_groups={{0,1},{2,3},{4,5},{6,7}}"))
    assert [c.size for c in found] == ([] if size is None else [size])


def test_groups_that_cannot_be_read():
    with pytest.raises(ValueError, match=r"cannot read the groups of c\.1"):
        hlo.collectives(line("all-reduce", "f32[2]", "replica_groups=mesh['x'=8] {'x':(2)4}"))
