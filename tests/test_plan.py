"""The plan of a step is that of the step that trains."""

import importlib.util
import types

import jax
import numpy as np
import pytest

from dmd_jax import main, sharding
from dmd_jax.data import pipeline
from dmd_jax.experiment import build, check
from dmd_jax.plan import machines, random_inputs, report, step
from dmd_jax.runtime import accelerators
from dmd_jax.stages import train
from tests.helpers.runs import smoke, stage_of

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu, the compiler for TPUs, is not installed"
)


def toy(**mesh):
    config = smoke()
    config.mesh.update(mesh)
    config.network.update(multipliers=(1,), attention=())
    config.teacher.recipe.optimizer.decay_steps = 0
    return config


def test_it_is_that_of_the_step_that_trains(tmp_path):
    config = toy(data=4, fsdp=2)
    found = step.make(stage_of(config, "teacher"), machines.find("cpu:8"))

    parallel = build.parallel(stage_of(config, "teacher"))
    recipe, params = (
        build.recipe(stage_of(config, "teacher"), parallel, tmp_path),
        stage_of(config, "teacher").network.init(0),
    )
    _, shardings = train.abstract_state(recipe, params, parallel)
    state = train.first_state(recipe, params, shardings)
    streams = build.streams(stage_of(config, "teacher"), tmp_path)
    batch = next(pipeline.batches(streams, seed=0, start=0, sharding=parallel.batch_sharding))
    compiled = train.compile_step(recipe.train_step, state, batch, shardings).program

    sizes = compiled.memory_analysis()
    assert (
        found.memory["arguments"] == sizes.argument_size_in_bytes
        and found.memory["temporaries"] == sizes.temp_size_in_bytes
    )
    assert (
        found.memory["total"]
        == found.memory["arguments"]
        + found.memory["temporaries"]
        + found.memory["outputs beside them"]
    )
    assert (
        found.compiled_operations
        == compiled.cost_analysis()["flops"]
        > found.operations
        > 0.5 * found.compiled_operations
    )
    assert found.parameters == sum(a.size for a in jax.tree.leaves(params))
    here = {
        name: sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(part))
        for name, part in vars(state.generator).items()
    }
    assert found.state == {
        "generator": here["params"],
        "its Adam": here["opt_state"],
        "its running mean": here["ema"],
    }
    gathered = [c for c in found.collectives if c.kind == "all-gather"]
    assert sum(c.size for c in gathered) == sum(
        2 * 4 * a.size // 2 for a in jax.tree.leaves(params) if a.size >= sharding.MIN_SPLIT
    )
    assert {report.axis(c.groups, found.mesh) for c in gathered} == {"fsdp"}
    described = report.describe(stage_of(config, "teacher"), machines.find("cpu:8"), found)
    assert "parameters gathered" in described


def test_what_a_loop_repeats_is_counted():
    once, config = step.make(stage_of(toy(), "teacher"), machines.find("cpu:1")), toy()
    config.teacher.accumulation = 4
    pieces = step.make(stage_of(config, "teacher"), machines.find("cpu:1"))
    assert pieces.operations == once.operations
    assert pieces.compiled_operations == pytest.approx(once.compiled_operations, rel=0.3)
    assert pieces.collectives == ()


def test_the_parts_of_a_state(tmp_path):
    config = toy()
    recipe = build.recipe(
        stage_of(config, "dmd"), build.parallel(stage_of(config, "dmd")), tmp_path
    )
    state = jax.eval_shape(recipe.init, stage_of(config, "teacher").network.abstract, recipe.others)
    found = step.at_rest(state, build.parallel(stage_of(config, "dmd")).state_shardings(state))
    assert found.keys() == {
        "generator",
        "its Adam",
        "its running mean",
        "fake score",
        "fake score's Adam",
        "teacher",
    }
    assert (
        found["its Adam"]
        == found["fake score's Adam"]
        == pytest.approx(2 * found["generator"], rel=0.01)
    )


@needs_libtpu
def test_a_tpu_that_is_not_there(capsys):
    step.run(build.stages(toy()), machines.find("v5e-8"), "teacher")
    printed = capsys.readouterr().out
    assert "8 chips TPU v5 lite as 2x4" in printed and "of 15.75, 15." in printed
    assert "gradients and metrics averaged" in printed and "bound by " in printed


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("v5e-1", 1),
        ("v5e-64", 64),
        ("v5litepod-64", 64),
        ("v6e-256", 256),
        ("v5p-8", 4),
        ("v5p-128", 64),
    ],
)
def test_slices_have_as_many_chips_as_google_counts(name, count):
    machine = machines.find(name)
    assert (
        len(machine.devices) == count
        and 0.9 * machine.chip.memory < machine.capacity < 1.02 * machine.chip.memory
    )
    assert accelerators.of(machine.devices[0].device_kind) is machine.chip


@pytest.mark.parametrize("name", ["v5e-3", "v9-8", "gpu:8xb9", "gpu:9xh100", "cpu:0", "tpu"])
def test_machines_that_do_not_exist(name):
    with pytest.raises(
        ValueError,
        match=f"no machine '{name}'; there are: v5e-N with N = 1, 4, .*gpu:Nxh100.*cpu:N",
    ):
        machines.find(name)


def test_compilers_that_are_missing(monkeypatch):
    monkeypatch.setattr(machines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "dmd_jax\[tpu\]"'):
        machines.find("v5e-8")
    with pytest.raises(ValueError, match=r'pip install "dmd_jax\[cuda13\]"'):
        machines.find("gpu:8xh100")


def test_the_machine_is_found_before_anything_can_start_jax(monkeypatch):
    calls = []
    for module, name in ((machines, "find"), (build, "stages"), (check, "stages"), (step, "run")):
        monkeypatch.setattr(module, name, lambda *_, name=name: calls.append(name))
    main._plan(toy())
    assert calls == ["find", "stages", "stages", "run"]


def test_a_gpu_has_what_jax_takes_of_it(monkeypatch):
    monkeypatch.setattr(machines.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(
        machines.topologies,
        "get_topology_desc",
        lambda **_: types.SimpleNamespace(devices=[None] * 8),
    )
    assert machines.find("gpu:8xh100").capacity == 0.75 * 80 * 2**30
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert machines.find("gpu:8xh100").capacity == 0.9 * 80 * 2**30


def test_what_cannot_be_planned():
    with pytest.raises(ValueError, match=r"mesh\.fsdp is 3, which leaves 2 of 8 devices idle"):
        step.run(build.stages(toy(fsdp=3)), machines.find("cpu:8"), "teacher")
    with pytest.raises(
        ValueError, match=r"config\.mesh has 6 devices, cpu:8 has 8; set mesh\.data=-1"
    ):
        step.run(build.stages(toy(data=2, fsdp=3)), machines.find("cpu:8"), "teacher")
    with pytest.raises(
        ValueError, match="the config trains no stage 'pairs'; there are: teacher, dmd"
    ):
        step.run(build.stages(toy()), machines.find("cpu:8"), "pairs")
    config = toy()
    config.teacher.batch_size = 12
    with pytest.raises(
        ValueError, match="images batch_size 12 is not divisible by 8 devices; use 8 or 16"
    ):
        step.run(build.stages(config), machines.find("cpu:8"), "teacher")
    with pytest.raises(
        ValueError, match="jax has started with 8 CPU devices; cpu:9 needs a process of its own"
    ):
        machines.find("cpu:9")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("RESOURCE_EXHAUSTED: ... Used 24.50G of 15.75G hbm. Exceeded", (24.5, 15.75)),
        (
            "the total memory required for HLO temporaries (1.00T) exceeds available HBM "
            "(512.00M).",
            (1024, 0.5),
        ),
    ],
)
def test_what_the_compiler_lacks(message, expected):
    assert machines.too_large(message) == tuple(n * 2**30 for n in expected)
    assert machines.too_large("INTERNAL: something else") is None


def machine(gibibytes=16.0):
    return machines.find("cpu:8")._replace(
        capacity=gibibytes * 2**30, chip=accelerators.CHIPS["v5e"]
    )


def of(config, memory, **settings):
    """A plan of `config` that takes so many GiB."""
    mesh = sharding.make_mesh(**config.mesh)
    memory = {"total": memory * 2**30}
    plain = dict(
        batch={"fresh": 64, "pairs": 64},
        accumulation=1,
        state={},
        parameters=10,
        seconds={"compiling": 1.0},
        operations=0,
    )
    return report.Plan(
        **plain | dict(mesh=mesh, memory=memory, fits=memory["total"] <= 16 * 2**30) | settings
    )


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (
            lambda rows, fsdp: 6 + 2 * rows,
            "--config.dmd.accumulation=2 --config.network.remat=True",
        ),  # rows on a chip: 8, 4, 2 or 1
        (
            lambda rows, fsdp: 4 + 1.4 * rows,
            "derived: 15.2 of 16 GiB): --config.dmd.accumulation=1",
        ),
        (
            lambda rows, fsdp: 10 + 4 * rows,
            "accumulation=2 --config.network.remat=True: 26 of 16, does not fit, 10 too much",
        ),
        (lambda rows, fsdp: 10 + 4 * rows, "derived: 14 of 16 GiB): --config.dmd.accumulation=8"),
        (
            lambda rows, fsdp: 14 - rows,
            "accumulation=2 --config.network.remat=True: 10 of 16, 6 are left, compiled in 1 s\n$",
        ),
        (
            lambda rows, fsdp: 20 / fsdp + rows,
            "--config.mesh.data=1 --config.mesh.fsdp=8: 3.5 of 16, 12.5 are left",
        ),
        (lambda rows, fsdp: 30.0, "dmd does not fit, even so; take more chips"),
    ],
)
def test_what_would_fit_instead(memory, expected, monkeypatch, capsys):
    config, tried = toy(), []
    config.dmd.update(batch_size=64)

    def make(stage, machine):
        tried.append(stage)
        assert stage.model.network["remat"]
        rows = 8 // stage.settings.accumulation
        return of(config, memory(rows, stage.run.mesh.fsdp), mesh=build.parallel(stage).mesh)

    monkeypatch.setattr(step, "make", make)
    step.advise(stage_of(config, "dmd"), machine(), of(config, 99.0))
    printed = capsys.readouterr().out
    assert printed.endswith(expected[:-1]) if expected.endswith("$") else expected in printed
    assert len(tried) <= 2 and not config.network.remat


def test_what_has_failed_is_not_tried_again(monkeypatch, capsys):
    config, tried = toy(), []
    config.network.remat = True
    config.dmd.update(batch_size=64, accumulation=8)
    monkeypatch.setattr(
        step, "make", lambda stage, *_: tried.append(stage.run.mesh.fsdp) or of(config, 5.0)
    )
    step.advise(stage_of(config, "dmd"), machine(), of(config, 99.0, accumulation=8))
    assert tried == [8]


def test_the_bound_is_the_narrowest(capsys):
    config = toy()
    groups = frozenset([tuple(range(8))])
    collective = types.SimpleNamespace(
        kind="all-reduce", groups=groups, size=8e9, count=1, source="", sent=14e9
    )
    found = of(config, 4.0, operations=197e11, accessed=409.5e9, collectives=(collective,))
    assert report.bounds(found, machine()) == pytest.approx(
        {"computing": 0.1, "memory": 0.5, "links": 0.07}
    )
    config.dmd.num_steps = 7200
    printed = report.describe(stage_of(config, "dmd"), machine(), found)
    assert (
        "bound by memory" in printed
        and "256 rows/s; 7,200 steps of dmd in 1 hours, 8 chip-hours" in printed
    )
    config.dmd.update(dict(continues="teacher"))
    printed = report.describe(stage_of(config, "dmd"), machine(), found)
    assert f"{7200 - config.teacher.num_steps:,} steps of dmd" in printed


def test_chips_by_their_names():
    names = {
        "TPU v4": "v4",
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v6 lite": "v6e",
        "NVIDIA H100 80GB HBM3": "h100",
    }
    assert {kind: accelerators.of(kind).name for kind in names} == names
    assert accelerators.of("cpu") is None and accelerators.of("NVIDIA A100-SXM4-40GB") is None


def test_stand_ins_have_the_shapes_of_the_data(tmp_path):
    config = toy()
    batch = random_inputs.random_batch(stage_of(config, "teacher"), 4)
    real = build.streams(stage_of(config, "teacher"), tmp_path)["images"].source[0]
    assert {k: (np.shape(v[0]), v.dtype) for k, v in batch["images"].items()} == {
        k: (np.shape(v), np.asarray(v).dtype) for k, v in real.items()
    }
