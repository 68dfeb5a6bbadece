"""Benchmarks: the time of a config's own DMD step, at its real size, with random weights.

python -m dmd_jax.bench step --network=cifar10 --batch_size=2
python -m dmd_jax.bench step --network=cifar10 --batch_size=2 --against=torch

Prints parameters, memory and seconds per step; beside them the time that XLA's own convolutions and matrix products of the step take
alone, one after another. `--against=torch` runs the same step in PyTorch in between, same network, losses, optimizers and batch.
"""

import argparse
import collections
import functools
import importlib.util
import math
import pathlib
import resource
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import checkpoint, experiment, sharding, train
from dmd_jax.models import vgg
from dmd_jax.weights import convert


def load_config(name: str):
    """Of configs/<name>.py; a word after a colon picks a variant."""
    file, _, variant = name.partition(":")
    path = pathlib.Path(__file__).parents[1] / "configs" / f"{file}.py"
    if not path.exists():
        raise ValueError(f"no config {path}; there are: {', '.join(sorted(p.stem for p in path.parent.glob('*.py')))}.")
    spec = importlib.util.spec_from_file_location(file, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()


def make_step(config, batch_size: int, directory: pathlib.Path):
    """The step of `config`, compiled, with its state and a batch; LPIPS has random weights, written to `directory`."""
    parallel = sharding.Parallel(sharding.make_mesh(**config.mesh))
    parallel.check_batch("batch_size", batch_size)
    distance = config.dmd.recipe.distance
    if "weights" in distance:
        distance.weights = str(directory / "lpips.npz")
        np.savez(distance.weights, **convert.to_torch(vgg.make().init(0)))
    recipe, params = experiment.make_recipe(config, "dmd", parallel, directory), experiment.make_network(config).init(0)
    state, shardings = train.first_state(recipe, params, parallel)
    batch = jax.device_put(random_batch(config, batch_size), parallel.batch_sharding)
    began = time.perf_counter()
    step = train.compile_step(recipe.train_step, state, batch, shardings)
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    return recipe, step, state, batch


def random_batch(config, n: int) -> dict:
    """Noise in place of images."""
    rng = np.random.default_rng(0)
    shape, cond = (n, *experiment.image_shape(config)), np.arange(n, dtype=np.int32) % 10
    pairs = {"noise": rng.standard_normal(shape, np.float32), "image": np.tanh(rng.standard_normal(shape, np.float32)), "cond": cond}
    return {"fresh": {"cond": cond}, "pairs": pairs}


def products(jaxpr, times: int = 1) -> collections.Counter:
    """How often a program runs each convolution and matrix product: {(primitive, shapes, parameters): count}, from its jaxpr."""
    found = collections.Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("conv_general_dilated", "dot_general"):
            avals = tuple((v.aval.shape, str(v.aval.dtype)) for v in eqn.invars)
            found[eqn.primitive, avals, tuple(sorted(eqn.params.items(), key=str))] += times
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                found += products(value, inner)
    return found


def seconds_alone(recipe, state, batch) -> float:
    """The time of the step's convolutions and matrix products, each as a program of its own."""
    total = 0.0
    for (primitive, avals, params), count in products(jax.make_jaxpr(recipe.train_step)(state, batch).jaxpr).items():
        arrays = [jnp.ones(shape, dtype) for shape, dtype in avals]
        program = jax.jit(functools.partial(primitive.bind, **dict(params))).lower(*arrays).compile()
        total += count * min(_timed(lambda p=program, a=arrays: jax.block_until_ready(p(*a)))[0] for _ in range(3))
    return total


def step(arguments: argparse.Namespace):
    """Times the DMD step."""
    if min(arguments.steps, arguments.batch_size) < 1:
        raise ValueError(f"steps is {arguments.steps} and batch_size {arguments.batch_size}; expected at least 1.")
    config = load_config(arguments.network)
    config.network.remat = arguments.remat
    config.network.dtype = arguments.dtype or config.network.dtype
    with tempfile.TemporaryDirectory() as directory:
        recipe, compiled, state, batch = make_step(config, arguments.batch_size, pathlib.Path(directory))
        other = None
        if arguments.against:
            from dmd_jax import bench_torch

            other = bench_torch.Step(config, jax.device_get(state.frozen), random_batch(config, arguments.batch_size))
    count = sum(a.size for a in jax.tree.leaves(state.generator.params))
    flops = compiled.cost_analysis()["flops"]
    print(f"device: {jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{arguments.network}, {config.network.dtype}, distance {config.dmd.recipe.distance.name}")
    print(f"batch {arguments.batch_size} + {arguments.batch_size} pairs")
    memory = compiled.memory_analysis()
    sizes = f"{memory.argument_size_in_bytes / 2**30:.1f} GiB of state and {memory.temp_size_in_bytes / 2**30:.1f} GiB besides"
    print(f"parameters: 3 x {count:,}; a step: {flops / 1e12:.3f} TFLOP, {sizes} on each device", flush=True)

    alone = seconds_alone(recipe, state, batch) if arguments.alone else None
    (state, metrics), ours, theirs = compiled(state, batch), [], []
    jax.block_until_ready(metrics)
    if other:
        other()
    for _ in range(arguments.steps):
        seconds, (state, metrics) = _timed(lambda s=state: jax.block_until_ready(compiled(s, batch)))
        ours.append(seconds)
        theirs += [_timed(other)[0]] if other else []
    print(f"jax: {_spread(ours)} s a step, {flops / statistics.median(ours) / 1e9:.0f} GFLOP/s")
    if alone:
        print(f"its convolutions and matrix products alone: {alone:.3f} s, {alone / statistics.median(ours):.2f} of the step")
    if other:
        print(f"torch {other.version}: {_spread(theirs)} s a step")
        print(f"jax is {_spread([b / a for a, b in zip(ours, theirs, strict=True)])} times as fast")
    if not all(math.isfinite(float(value)) for value in metrics.values()):
        raise ValueError(f"the step is not finite: {jax.device_get(metrics)}.")
    if arguments.checkpoint:
        _checkpoint(state, pathlib.Path(arguments.checkpoint))
    stats = jax.devices()[0].memory_stats() or {}
    print(f"peak memory: {stats.get('peak_bytes_in_use', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30:.1f} GiB")


def _checkpoint(state, directory):
    manager = checkpoint.open_manager(directory)
    abstract = train.abstract_state(state)

    def save():
        checkpoint.save(manager, state, int(state.step), fingerprint="bench", metrics={})
        manager.wait_until_finished()

    seconds, _ = _timed(save)
    expected = float(jnp.sum(state.generator.params["map_layer0"]["kernel"]))
    step = int(state.step)
    jax.tree.map(lambda a: a.delete(), state)
    restored = checkpoint.restore(manager, abstract, fingerprint="bench")
    if float(jnp.sum(restored.generator.params["map_layer0"]["kernel"])) != expected:
        raise ValueError(f"the checkpoint in {directory} differs from what was saved.")
    size = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
    print(f"checkpoint of step {step}: {size / 1e9:.2f} GB, saved in {seconds:.0f} s, read back the same")


def _timed(function):
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def _spread(values):
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dmd_jax.bench", description=__doc__.split("\n")[0])
    command = parser.add_subparsers(required=True).add_parser("step", help="the DMD step of a config")
    command.set_defaults(run=step)
    command.add_argument("--network", default="cifar10", help="a config of configs/, by name, such as fashion_mnist:small")
    command.add_argument("--batch_size", type=int, default=2, help="fresh images, and as many pairs, over all devices")
    command.add_argument("--steps", type=int, default=5, help="to be timed, after one that is not")
    command.add_argument("--against", default="", choices=["", "torch"], help="what to compare with")
    command.add_argument("--dtype", default="", choices=["", "float32", "bfloat16"], help="of the networks; the config's if not given")
    command.add_argument("--remat", action="store_true", help="recompute activations")
    command.add_argument("--checkpoint", default="", help="directory to which the state is saved, and from which it is read back")
    command.add_argument("--no-alone", dest="alone", action="store_false", help="do not time convolutions and matrix products alone")
    return parser.parse_args(argv)


def main():
    arguments = parse(sys.argv[1:])
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
