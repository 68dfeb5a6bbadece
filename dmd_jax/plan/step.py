"""A training step for a machine that need not be there: what it takes of each chip, and what no step can be faster than.

The program is the one that the stage trains with, compiled ahead of time for the machine's devices. Figures are compiled (the compiler's),
counted (from shapes or from the program's text) or derived from such; a step takes at least

    max(operations / peak, bytes accessed / bandwidth of the memory, bytes sent / bandwidth of the links)

(the roofline: Williams et al., Commun. ACM 52, 2009).
"""

import math
import pathlib
import tempfile
import time

import jax
import ml_collections

from dmd_jax import sharding
from dmd_jax.experiment import build
from dmd_jax.plan import hlo, machines, random_inputs, report
from dmd_jax.runtime import flops


def run(config: ml_collections.ConfigDict, machine: machines.Target, stage: str | None = None):
    """Prints the plan of each training stage of `config`, or of the one named, for `machine`.

    Raises:
      ValueError: there is no such stage, or the machine cannot share the batch.
    """
    training = [name for name in config.stages if "recipe" in config[name]]
    if stage and stage not in training:
        raise ValueError(f"the config trains no stage {stage!r}; there are: {', '.join(training)}.")
    print(f"{machine.name}: {machine.about}, jax {jax.__version__}")
    if machine.options:
        print(
            f"compiler options {machine.options}: not those of training, whose memory and traffic may differ",
            flush=True,
        )
    for name in [stage] if stage else training:
        found = make(config, name, machine)
        print(report.describe(config, name, machine, found), flush=True)
        if found.fits is False:
            advise(config, name, machine, found)


def make(config: ml_collections.ConfigDict, stage: str, machine: machines.Target) -> report.Plan:
    """Compiles the step of a stage; the networks in training are shapes alone, what else it reads is random.

    Raises:
      ValueError: the devices cannot share the batch.
    """
    config = config.copy_and_resolve_references()
    parallel = sharding.Parallel(
        sharding.make_mesh(**config.mesh, devices=machine.devices),
        config[stage].get("accumulation", 1),
    )
    if parallel.mesh.size != len(machine.devices):
        raise ValueError(
            f"config.mesh has {parallel.mesh.size} devices, {machine.name} has {len(machine.devices)}; set mesh.data=-1."
        )
    sizes = random_inputs.batch_sizes(config, stage)
    for name, size in sizes.items():
        parallel.check_batch(f"{name} batch_size", size)
    with tempfile.TemporaryDirectory() as directory:
        random_inputs.write_files(config, stage, pathlib.Path(directory))
        recipe = build.make_recipe(config, stage, parallel, pathlib.Path(directory))
    state = jax.eval_shape(recipe.init, build.make_network(config, stage).abstract, recipe.others)
    shardings = parallel.state_shardings(state)
    placed = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
    )
    shape = lambda a, size: jax.ShapeDtypeStruct(
        (size, *a.shape[1:]), a.dtype, sharding=parallel.batch_sharding
    )
    rows = random_inputs.random_batch(config, stage, 1)
    batch = {
        name: jax.tree.map(lambda a, size=size: shape(a, size), rows[name])
        for name, size in sizes.items()
    }

    step = jax.jit(
        recipe.train_step, donate_argnums=0, out_shardings=(shardings, None)
    )  # as train.compile_step
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
    """With what the compiled program says; `repeated` are operations of loops beyond their first round."""
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


def advise(
    config: ml_collections.ConfigDict, stage: str, machine: machines.Target, failed: report.Plan
):
    """Prints what would fit in the place of the step `failed`, which does not, after compiling at most two others.

    The smallest pieces of the batch are tried first, activations recomputed. If they fit, pieces of a middle size are tried and a line is
    drawn through the two; if not, the state is split over all devices.
    """
    per_device = math.gcd(*failed.batch.values()) // failed.mesh.size
    pieces = [
        n for n in range(per_device, 0, -1) if per_device % n == 0
    ]  # accumulation, from the smallest pieces to the largest
    overrides = {f"{stage}.accumulation": pieces[0]}
    if not build.of_stage(config, stage, "network").get("remat", True):
        overrides[
            "network.remat" if "network" not in config[stage] else f"{stage}.network.remat"
        ] = True
    same = len(overrides) == 1 and failed.accumulation == pieces[0]
    smallest = failed if same else _try(config, stage, machine, overrides)
    if not smallest.fits:
        overrides |= {"mesh.data": 1, "mesh.fsdp": smallest.mesh.size}
        if (
            config.mesh.fsdp == smallest.mesh.size
            or not _try(config, stage, machine, overrides).fits
        ):
            print(f"{stage} does not fit, even so; take more chips, or chips with more memory")
        return
    if len(pieces) == 1:
        return
    middle = pieces[len(pieces) // 2]
    larger = _try(config, stage, machine, overrides | {f"{stage}.accumulation": middle})
    slope = (larger.memory["total"] - smallest.memory["total"]) / (
        per_device // middle - per_device // pieces[0]
    )
    if slope > 0:
        needed = {
            n: smallest.memory["total"] + slope * (per_device // n - per_device // pieces[0])
            for n in pieces
        }
        best = min(n for n in pieces if needed[n] <= machine.capacity)
        flags = report.flags(overrides | {f"{stage}.accumulation": best})
        print(
            f"largest pieces that fit by these two (derived: {report.gib(needed[best])} of {report.gib(machine.capacity)} GiB): {flags}"
        )


def _try(config, stage, machine, overrides):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(overrides)
    found = make(config, stage, machine)
    print(
        f"{report.flags(overrides)}: {report.fit(found, machine)}, compiled in {found.seconds['compiling']:.0f} s",
        flush=True,
    )
    return found
