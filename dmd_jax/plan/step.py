"""A training step for a machine that need not be there: what it takes, and how fast it can be.

The program is the one that the stage trains with, compiled ahead of time for the machine's devices.
Figures are compiled (the compiler's), counted (from shapes or from the program's text) or derived
from such; a step takes at least

    max(operations / peak, bytes accessed / memory bandwidth, bytes sent / link bandwidth)

(the roofline: Williams et al., Commun. ACM 52, 2009).
"""

import math
import pathlib
import tempfile
import time
from collections.abc import Mapping

import jax

from dmd_jax.experiment import build
from dmd_jax.plan import hlo, machines, random_inputs, report
from dmd_jax.runtime import flops


def run(stages: Mapping[str, build.Stage], machine: machines.Target, only: str | None = None):
    """Prints the plan of each training stage of a run for a machine.

    Args:
      stages: of the run, by name.
      machine: the one that the plan is for.
      only: the one stage to plan; None for all.

    Raises:
      ValueError: there is no such stage, or the machine cannot share the batch.
    """
    run = next(iter(stages.values())).run
    training = [name for name in run.stages if stages[name].settings.program == "train"]
    if only and only not in training:
        raise ValueError(f"the config trains no stage {only!r}; there are: {', '.join(training)}.")
    print(f"{machine.name}: {machine.about}, jax {jax.__version__}")
    if machine.options:
        print(
            f"compiler options {machine.options}: not those of training, whose memory and traffic "
            "may differ",
            flush=True,
        )
    for name in [only] if only else training:
        plan = make(stages[name], machine)
        print(report.describe(stages[name], machine, plan), flush=True)
        if plan.fits is False:
            advise(stages[name], machine, plan)


def make(stage: build.Stage, machine: machines.Target) -> report.Plan:
    """Compiles the step of a training stage.

    The networks in training are shapes alone; what else the step reads is random.

    Raises:
      ValueError: the devices cannot share the batch.
    """
    parallel = build.parallel(stage, machine.devices)
    if parallel.mesh.size != len(machine.devices):
        raise ValueError(
            f"config.mesh has {parallel.mesh.size} devices, {machine.name} has "
            f"{len(machine.devices)}; set mesh.data=-1."
        )
    sizes = random_inputs.batch_sizes(stage)
    for name, size in sizes.items():
        parallel.check_batch(f"{name} batch_size", size)
    with tempfile.TemporaryDirectory() as directory:
        placed = random_inputs.write_files(stage, pathlib.Path(directory))
        recipe = build.recipe(placed, parallel, pathlib.Path(directory))
    state = jax.eval_shape(recipe.init, stage.network.abstract, recipe.others)
    shardings = parallel.state_shardings(state)
    placed = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
    )
    shape = lambda a, size: jax.ShapeDtypeStruct(
        (size, *a.shape[1:]), a.dtype, sharding=parallel.batch_sharding
    )
    rows = random_inputs.random_batch(stage, 1)
    batch = {
        name: jax.tree.map(lambda a, size=size: shape(a, size), rows[name])
        for name, size in sizes.items()
    }

    # As train.compile_step.
    step = jax.jit(recipe.train_step, donate_argnums=0, out_shardings=(shardings, None))
    began = time.perf_counter()
    traced = step.trace(placed, batch)
    seconds = {"tracing": time.perf_counter() - began}
    lowered = traced.lower()
    seconds["lowering"] = time.perf_counter() - began - seconds["tracing"]
    products, once = (
        flops.products(traced.jaxpr.jaxpr, times) for times in (flops.trips, flops.once)
    )
    plan = report.Plan(
        mesh=parallel.mesh,
        batch=sizes,
        accumulation=parallel.accumulation,
        state=at_rest(state, shardings),
        parameters=sum(math.prod(a.shape) for a in jax.tree.leaves(state.generator.params)),
        seconds=seconds,
        memory={},
        fits=None,
        operations=flops.total(products),
    )
    began = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=machine.options)
    except jax.errors.JaxRuntimeError as error:
        if not (needed := machines.too_large(str(error))):
            raise
        seconds["compiling"] = time.perf_counter() - began
        return plan._replace(memory={"total": needed[0]}, fits=False)
    seconds["compiling"] = time.perf_counter() - began
    return _measured(plan, compiled, machine, repeated=plan.operations - flops.total(once))


def _measured(plan, compiled, machine, repeated):
    """Adds what the compiled program says; `repeated` are operations of loops' later rounds."""
    text, cost, sizes = (
        compiled.as_text(),
        compiled.cost_analysis() or {},
        compiled.memory_analysis(),
    )
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs beside them": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
    }
    memory["total"] = sum(memory.values())
    return plan._replace(
        memory=memory,
        fits=machine.capacity and memory["total"] <= machine.capacity,
        compiled_operations=cost["flops"] + repeated if "flops" in cost else None,
        accessed=cost["bytes accessed"] * hlo.repetition(text)
        if "bytes accessed" in cost
        else None,
        collectives=tuple(hlo.collectives(text)),
    )


def at_rest(state, shardings) -> dict[str, int]:
    """Bytes on each device of the parts of an abstract state."""
    sizes = jax.tree.map(
        lambda a, s: math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize, state, shardings
    )
    frozen, fake = sizes.frozen or {}, sizes.fake_score
    parts = {
        "generator": sizes.generator.params,
        "its Adam": sizes.generator.opt_state,
        "its running mean": sizes.generator.ema,
        "fake score": fake and fake.params,
        "fake score's Adam": fake and fake.opt_state,
        "teacher": frozen.get("real_score"),
        "distance": frozen.get("distance"),
    }
    return {name: size for name, part in parts.items() if (size := sum(jax.tree.leaves(part)))}


def advise(stage: build.Stage, machine: machines.Target, failed: report.Plan):
    """Prints what would fit in the place of a step that does not; compiles at most two others.

    The smallest pieces of the batch are tried first, activations recomputed. If they fit, pieces of
    a middle size are tried and a line is drawn through the two; if not, the state is split over all
    devices.

    Args:
      stage: whose step does not fit.
      machine: the one that it does not fit.
      failed: the plan of that step.
    """
    per_device = math.gcd(*failed.batch.values()) // failed.mesh.size
    # Accumulation, from the smallest pieces to the largest.
    pieces = [n for n in range(per_device, 0, -1) if per_device % n == 0]
    accumulation = f"{stage.name}.accumulation"
    overrides = {accumulation: pieces[0]}
    if not stage.model.network.get("remat", True):
        own = stage.settings.network is not None
        overrides[f"{stage.name}.network.remat" if own else "network.remat"] = True
    same = len(overrides) == 1 and failed.accumulation == pieces[0]
    smallest = failed if same else _try(stage, machine, overrides)
    if not smallest.fits:
        overrides |= {"mesh.data": 1, "mesh.fsdp": smallest.mesh.size}
        split = stage.run.mesh.fsdp == smallest.mesh.size
        if split or not _try(stage, machine, overrides).fits:
            print(f"{stage.name} does not fit, even so; take more chips, or chips with more memory")
        return
    if len(pieces) == 1:
        return
    middle = pieces[len(pieces) // 2]
    larger = _try(stage, machine, overrides | {accumulation: middle})
    rows = per_device // middle - per_device // pieces[0]
    slope = (larger.memory["total"] - smallest.memory["total"]) / rows
    if slope > 0:
        needed = {
            n: smallest.memory["total"] + slope * (per_device // n - per_device // pieces[0])
            for n in pieces
        }
        best = min(n for n in pieces if needed[n] <= machine.capacity)
        flags = report.flags(overrides | {accumulation: best})
        size = f"{report.gib(needed[best])} of {report.gib(machine.capacity)} GiB"
        print(f"largest pieces that fit by these two (derived: {size}): {flags}")


def _try(stage, machine, overrides):
    plan = make(build.overridden(stage, overrides), machine)
    print(
        f"{report.flags(overrides)}: {report.fit(plan, machine)}, "
        f"compiled in {plan.seconds['compiling']:.0f} s",
        flush=True,
    )
    return plan
