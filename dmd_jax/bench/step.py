"""The DMD step of a config at its real size, with random weights; beside it the same in PyTorch."""

import argparse
import functools
import math
import pathlib
import statistics
import tempfile

import jax
import jax.numpy as jnp

from dmd_jax import recipes
from dmd_jax.experiment import build, configs
from dmd_jax.plan import random_inputs
from dmd_jax.runtime import checkpoint, flops, timing
from dmd_jax.stages import train


def step(arguments: argparse.Namespace):
    """Times the DMD step."""
    if min(arguments.steps, arguments.batch_size) < 1:
        raise ValueError(
            f"steps is {arguments.steps} and batch_size {arguments.batch_size}; "
            "expected at least 1."
        )
    config = configs.load(arguments.config)
    config.network.remat = arguments.remat
    config.network.dtype = arguments.dtype or config.network.dtype
    if arguments.against and not config.network.name.startswith("unet_edm."):
        raise ValueError(
            f"--against=torch knows the networks of unet_edm alone, not {config.network.name}; "
            "for that one use forward."
        )
    stage = build.stages(config)["dmd"]
    with tempfile.TemporaryDirectory() as directory:
        recipe, compiled, state, batch = make_step(
            stage, arguments.batch_size, pathlib.Path(directory)
        )
        torch_step = None
        if arguments.against:
            torch_step = _make_torch_step(stage, state, arguments.batch_size)
    print(timing.devices())
    print(f"{arguments.config}, {config.network.dtype}, distance {config.dmd.recipe.distance.name}")
    print(f"batch {arguments.batch_size} + {arguments.batch_size} pairs")
    _print_sizes(compiled, state)

    seconds_alone = None
    if arguments.alone:
        seconds_alone = time_products(recipe, state, batch)
    state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics)
    if torch_step:
        torch_step()
    ours = []
    theirs = []
    for _ in range(arguments.steps):
        seconds, (state, metrics) = timing.timed(
            lambda s=state: jax.block_until_ready(compiled(s, batch))
        )
        ours.append(seconds)
        if torch_step:
            seconds, _ = timing.timed(torch_step)
            theirs.append(seconds)

    median = statistics.median(ours)
    gflops = compiled.cost_analysis()["flops"] / median / 1e9
    print(f"jax: {timing.spread(ours)} s a step, {gflops:.0f} GFLOP/s")
    if seconds_alone:
        print(
            f"its convolutions and matrix products alone: {seconds_alone:.3f} s, "
            f"{seconds_alone / median:.2f} of the step"
        )
    if torch_step:
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        print(f"torch {torch_step.version}: {timing.spread(theirs)} s a step")
        print(f"jax is {timing.spread(ratios)} times as fast")
    if not all(math.isfinite(float(value)) for value in metrics.values()):
        raise ValueError(f"the step is not finite: {jax.device_get(metrics)}.")
    if arguments.checkpoint:
        _time_checkpoint(state, pathlib.Path(arguments.checkpoint))
    print(f"peak memory: {timing.peak_memory()}")


def make_step(stage: build.Stage, batch_size: int, directory: pathlib.Path):
    """Compiles the step of a training stage.

    Args:
      stage: of the recipe dmd.
      batch_size: fresh images, and as many pairs, over all devices.
      directory: where the random files are written that the step reads.

    Returns:
      The recipe, the compiled step, its state and a batch.
    """
    parallel = build.parallel(stage)
    parallel.check_batch("batch_size", batch_size)
    recipe = build.recipe(random_inputs.write_files(stage, directory), parallel, directory)
    params = stage.network.init(0)
    _, shardings = train.abstract_state(recipe, params, parallel)
    state = train.first_state(recipe, params, shardings)
    batch = random_inputs.random_batch(stage, batch_size)
    batch = jax.device_put(batch, parallel.batch_sharding)
    seconds, compiled = timing.timed(
        lambda: train.compile_step(recipe.train_step, state, batch, shardings).program
    )
    print(f"compiled in {seconds:.0f} s", flush=True)
    return recipe, compiled, state, batch


def time_products(recipe: recipes.Recipe, state, batch) -> float:
    """Returns the seconds of the step's convolutions and matrix products, each run on its own."""
    jaxpr = jax.make_jaxpr(recipe.train_step)(state, batch).jaxpr
    total = 0.0
    for (primitive, avals, params), count in flops.products(jaxpr).items():
        arrays = [jnp.ones(shape, dtype) for shape, dtype in avals]
        product = functools.partial(primitive.bind, **dict(params))
        program = jax.jit(product).lower(*arrays).compile()
        run = lambda p=program, a=arrays: jax.block_until_ready(p(*a))
        total += count * min(timing.timed(run)[0] for _ in range(3))
    return total


def _make_torch_step(stage, state, batch_size):
    from dmd_jax.bench import torch_step  # torch is no requirement

    batch = random_inputs.random_batch(stage, batch_size)
    return torch_step.Step(stage, jax.device_get(state.frozen), batch)


def _print_sizes(compiled, state):
    count = sum(a.size for a in jax.tree.leaves(state.generator.params))
    teraflops = compiled.cost_analysis()["flops"] / 1e12
    memory = compiled.memory_analysis()
    print(
        f"parameters: 3 x {count:,}; a step: {teraflops:.3f} TFLOP, "
        f"{memory.argument_size_in_bytes / 2**30:.1f} GiB of state and "
        f"{memory.temp_size_in_bytes / 2**30:.1f} GiB besides on each device",
        flush=True,
    )


def _time_checkpoint(state, directory):
    """Saves the state, deletes it, and reads it back."""
    manager = checkpoint.open_manager(directory)
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
        state.replace(frozen=None),
    )

    def save():
        checkpoint.save(manager, state, int(state.step), metrics={})
        manager.wait_until_finished()

    def sum_of_last(state):
        return float(jnp.sum(jax.tree.leaves(state.generator.params)[-1]))

    seconds, _ = timing.timed(save)
    number = int(state.step)
    expected = sum_of_last(state)
    jax.tree.map(lambda a: a.delete(), state)
    restored = checkpoint.restore(manager, abstract)
    if sum_of_last(restored) != expected:
        raise ValueError(f"the checkpoint in {directory} differs from what was saved.")
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(
        f"checkpoint of step {number}: {size / 1e9:.2f} GB, "
        f"saved in {seconds:.0f} s, read back the same"
    )
