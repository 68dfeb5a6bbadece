"""Benchmarks of a config's own networks, at their real size, with random weights.

python -m dmd_jax.bench step --network=cifar10 --batch_size=2
python -m dmd_jax.bench step --network=cifar10 --batch_size=2 --against=torch
python -m dmd_jax.bench forward --network=coco --against=torch
python -m dmd_jax.bench sample --network=coco --teacher_steps=3
python -m dmd_jax.bench stack --network=coco
python -m dmd_jax.bench features --features=inception --against=torch
python -m dmd_jax.bench memory --images=50000

`step` prints parameters, memory and seconds of the DMD step; beside them the time that XLA's own convolutions and matrix products of the
step take alone, one after another. `--against=torch` runs the same step in PyTorch in between, same network, losses, optimizers and batch.
`forward` does so for the UNet of Stable Diffusion and diffusers' with the same weights, and prints how far apart they are. `sample` times
one step against the teacher's sampler, `stack` against one step of two UNets in series. `features` times a feature network of evaluations
as `forward` does the UNet; `memory` tells what the statistics of many images take.
"""

import argparse
import math
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from dmd_jax import sharding
from dmd_jax.bench import features as features_lib
from dmd_jax.bench import stable_diffusion
from dmd_jax.experiment import build, configs
from dmd_jax.models import clip_text, vae
from dmd_jax.plan import random_inputs
from dmd_jax.runtime import checkpoint, timing
from dmd_jax.stages import train


def make_step(config, batch_size: int, directory: pathlib.Path):
    """The step of `config`, compiled, with its state and a batch; what else it reads is random and written to `directory`."""
    parallel = sharding.Parallel(sharding.make_mesh(**config.mesh))
    parallel.check_batch("batch_size", batch_size)
    random_inputs.write_files(config, "dmd", directory)
    recipe, params = (
        build.make_recipe(config, "dmd", parallel, directory),
        build.make_network(config).init(0),
    )
    _, shardings = train.abstract_state(recipe, params, parallel)
    state = train.first_state(recipe, params, shardings)
    batch = jax.device_put(
        random_inputs.random_batch(config, "dmd", batch_size), parallel.batch_sharding
    )
    began = time.perf_counter()
    step = train.compile_step(recipe.train_step, state, batch, shardings).program
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    return recipe, step, state, batch


def step(arguments: argparse.Namespace):
    """Times the DMD step."""
    if min(arguments.steps, arguments.batch_size) < 1:
        raise ValueError(
            f"steps is {arguments.steps} and batch_size {arguments.batch_size}; expected at least 1."
        )
    config = configs.load(arguments.network)
    config.network.remat = arguments.remat
    config.network.dtype = arguments.dtype or config.network.dtype
    if arguments.against and not config.network.name.startswith("unet_edm."):
        raise ValueError(
            f"--against=torch knows the networks of unet_edm alone, not {config.network.name}; for that one use forward."
        )
    with tempfile.TemporaryDirectory() as directory:
        recipe, compiled, state, batch = make_step(
            config, arguments.batch_size, pathlib.Path(directory)
        )
        other = None
        if arguments.against:
            from dmd_jax.bench import torch_step

            other = torch_step.Step(
                config,
                jax.device_get(state.frozen),
                random_inputs.random_batch(config, "dmd", arguments.batch_size),
            )
    count = sum(a.size for a in jax.tree.leaves(state.generator.params))
    flops = compiled.cost_analysis()["flops"]
    print(timing.devices())
    print(
        f"{arguments.network}, {config.network.dtype}, distance {config.dmd.recipe.distance.name}"
    )
    print(f"batch {arguments.batch_size} + {arguments.batch_size} pairs")
    memory = compiled.memory_analysis()
    sizes = f"{memory.argument_size_in_bytes / 2**30:.1f} GiB of state and {memory.temp_size_in_bytes / 2**30:.1f} GiB besides"
    print(
        f"parameters: 3 x {count:,}; a step: {flops / 1e12:.3f} TFLOP, {sizes} on each device",
        flush=True,
    )

    alone = timing.seconds_alone(recipe, state, batch) if arguments.alone else None
    (state, metrics), ours, theirs = compiled(state, batch), [], []
    jax.block_until_ready(metrics)
    if other:
        other()
    for _ in range(arguments.steps):
        seconds, (state, metrics) = timing.timed(
            lambda s=state: jax.block_until_ready(compiled(s, batch))
        )
        ours.append(seconds)
        theirs += [timing.timed(other)[0]] if other else []
    print(
        f"jax: {timing.spread(ours)} s a step, {flops / statistics.median(ours) / 1e9:.0f} GFLOP/s"
    )
    if alone:
        print(
            f"its convolutions and matrix products alone: {alone:.3f} s, {alone / statistics.median(ours):.2f} of the step"
        )
    if other:
        print(f"torch {other.version}: {timing.spread(theirs)} s a step")
        print(
            f"jax is {timing.spread([b / a for a, b in zip(ours, theirs, strict=True)])} times as fast"
        )
    if not all(math.isfinite(float(value)) for value in metrics.values()):
        raise ValueError(f"the step is not finite: {jax.device_get(metrics)}.")
    if arguments.checkpoint:
        _checkpoint(state, pathlib.Path(arguments.checkpoint))
    print(f"peak memory: {timing.peak_memory()}")


def _checkpoint(state, directory):
    manager = checkpoint.open_manager(directory)
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
        state.replace(frozen=None),
    )

    def save():
        checkpoint.save(manager, state, int(state.step), fingerprint="bench", metrics={})
        manager.wait_until_finished()

    seconds, _ = timing.timed(save)
    total = lambda state: float(jnp.sum(jax.tree.leaves(state.generator.params)[-1]))
    expected = total(state)
    step = int(state.step)
    jax.tree.map(lambda a: a.delete(), state)
    restored = checkpoint.restore(manager, abstract, fingerprint="bench")
    if total(restored) != expected:
        raise ValueError(f"the checkpoint in {directory} differs from what was saved.")
    size = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
    print(
        f"checkpoint of step {step}: {size / 1e9:.2f} GB, saved in {seconds:.0f} s, read back the same"
    )


def forward(arguments: argparse.Namespace):
    """Times the UNet of Stable Diffusion, and holds it against diffusers'."""
    config = _of_stable_diffusion(arguments)
    found = stable_diffusion.forward(
        config,
        batch_size=arguments.batch_size,
        repeats=arguments.repeats,
        against=arguments.against,
    )
    print(
        f"jax: {timing.spread(found.seconds)} s a call, compiled in {found.compile_seconds:.0f} s; {found.parameters:,} parameters"
    )
    if found.other:
        name, seconds = found.other
        print(f"{name}: {timing.spread(seconds)} s a call")
        print(
            f"jax is {timing.spread([b / a for a, b in zip(found.seconds, seconds, strict=True)])} times as fast"
        )
        print(f"largest difference: {found.difference:.1e} of the largest output")
    print(f"peak memory: {timing.peak_memory()}")


def sample(arguments: argparse.Namespace):
    """Times one step against the teacher's sampler, from texts to images."""
    config = _of_stable_diffusion(arguments)
    sizes = dict(
        batch_size=arguments.batch_size,
        teacher_steps=arguments.teacher_steps,
        repeats=arguments.repeats,
    )
    found = stable_diffusion.sample(config, *_around(arguments, config), **sizes)
    part = found.nfe / found.calls
    print(f"text encoder: {timing.spread(found.text)} s; decoder: {timing.spread(found.decoder)} s")
    print(f"one step: {timing.spread(found.one_step)} s")
    calls = [seconds / found.calls for seconds in found.teacher]
    print(
        f"teacher, {found.calls} guided calls: {timing.spread(found.teacher)} s, {timing.spread(calls)} s a call"
    )
    if part != 1:
        print(f"below, the teacher's {found.nfe} calls are extrapolated from {found.calls}")
    rows = list(zip(found.text, found.one_step, found.teacher, found.decoder, strict=True))
    networks = [part * teacher / one for _, one, teacher, _ in rows]
    images = [
        (text + part * teacher + decoder) / (text + one + decoder)
        for text, one, teacher, decoder in rows
    ]
    print(
        f"one step is {timing.spread(images)} times as fast from text to image; the network alone {timing.spread(networks)}"
    )
    print(f"peak memory: {timing.peak_memory()}")


def stack(arguments: argparse.Namespace):
    """Times one step of one UNet against one of two in series, from texts to images."""
    config = _of_stable_diffusion(arguments)
    found = stable_diffusion.stack(
        config,
        *_around(arguments, config),
        batch_size=arguments.batch_size,
        repeats=arguments.repeats,
    )
    print(f"text encoder: {timing.spread(found.text)} s; decoder: {timing.spread(found.decoder)} s")
    for name, count, seconds in zip(
        ("one UNet", "two in series"), found.parameters, (found.one, found.two), strict=True
    ):
        print(f"{name}, {count:,} parameters: {timing.spread(seconds)} s")
    rows = list(zip(found.text, found.one, found.two, found.decoder, strict=True))
    images = [(text + two + decoder) / (text + one + decoder) for text, one, two, decoder in rows]
    networks = [two / one for _, one, two, _ in rows]
    print(
        f"two take {timing.spread(images)} times as long from text to image; the network alone {timing.spread(networks)}"
    )
    print(f"peak memory: {timing.peak_memory()}")


def features(arguments: argparse.Namespace):
    """Times a feature network, and holds it against PyTorch's."""
    if min(arguments.images, arguments.batch_size, arguments.repeats) < 1 or arguments.size < 0:
        raise ValueError(
            "expected --images, --batch_size and --repeats of at least 1, and --size of at least 0."
        )
    print(timing.devices(), flush=True)
    sizes = dict(count=arguments.images, size=arguments.size, batch_size=arguments.batch_size)
    found = features_lib.features(
        arguments.features, **sizes, repeats=arguments.repeats, against=arguments.against
    )
    rates = [[arguments.images / s for s in seconds] for seconds in (found.seconds, found.other)]
    print(f"{arguments.features}, {arguments.images} images in batches of {arguments.batch_size}")
    print(f"jax: {timing.spread(rates[0])} images/s")
    if found.other:
        print(f"torch: {timing.spread(rates[1])} images/s")
        print(f"jax is {timing.spread([a / b for a, b in zip(*rates, strict=True)])} times as fast")
        print(f"largest difference: {found.difference:.1e} of the largest feature")


def memory(arguments: argparse.Namespace):
    """Tells the memory that the statistics of many images take."""
    if arguments.images < 2:
        raise ValueError(f"images is {arguments.images}; expected at least 2.")
    print(timing.devices(), flush=True)
    found = features_lib.statistics(arguments.images)
    print(
        f"{arguments.images} images of 32x32 pixels, {features_lib.DIMENSIONS} features: {found.seconds:.0f} s"
    )
    print(f"peak memory: {found.peak:.0f} MB, {found.peak - found.start:.0f} MB more than before")


def _around(arguments, config):
    """The text encoder and the autoencoder of Stable Diffusion."""
    if config.text.name != "clip":
        raise ValueError(
            f"{arguments.network} takes its texts from {config.text.name}, expected clip; use --network=coco."
        )
    width = config.network.cross_attention_dim
    encoder = clip_text.clip(
        hidden_size=width, intermediate_size=4 * width, num_heads=max(width // 64, 1)
    )
    return encoder, vae.kl(latent_channels=config.network.channels)


def _of_stable_diffusion(arguments):
    """The config, after the first lines."""
    if min(arguments.repeats, arguments.batch_size) < 1:
        raise ValueError(
            f"repeats is {arguments.repeats} and batch_size {arguments.batch_size}; expected at least 1."
        )
    config = configs.load(arguments.network)
    if config.network.name != "unet_sd.unet":
        raise ValueError(
            f"the network of {arguments.network} is {config.network.name}, expected unet_sd.unet; use --network=coco."
        )
    config.network.dtype = arguments.dtype
    print(timing.devices())
    print(f"{arguments.network}, {config.network.dtype}, batch {arguments.batch_size}", flush=True)
    return config


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dmd_jax.bench", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(required=True)

    def add(run, network=""):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.set_defaults(run=run)
        if network:
            command.add_argument(
                "--network",
                default=network,
                help="a config of configs/, by name, such as fashion_mnist:small",
            )
        return command

    command = add(step, "cifar10")
    command.add_argument(
        "--batch_size",
        type=int,
        default=2,
        help="fresh images, and as many pairs, over all devices",
    )
    command.add_argument("--steps", type=int, default=5, help="to be timed, after one that is not")
    command.add_argument(
        "--against", default="", choices=["", "torch"], help="what to compare with"
    )
    command.add_argument(
        "--dtype",
        default="",
        choices=["", "float32", "bfloat16"],
        help="of the networks; the config's if not given",
    )
    command.add_argument("--remat", action="store_true", help="recompute activations")
    command.add_argument(
        "--checkpoint",
        default="",
        help="directory to which the state is saved, and from which it is read back",
    )
    command.add_argument(
        "--no-alone",
        dest="alone",
        action="store_false",
        help="do not time convolutions and matrix products alone",
    )

    for run in (forward, sample, stack):
        command = add(run, "coco")
        command.add_argument("--batch_size", type=int, default=1, help="over all devices")
        command.add_argument(
            "--repeats", type=int, default=3, help="to be timed, after one that is not"
        )
        command.add_argument(
            "--dtype", default="float32", choices=["float32", "bfloat16"], help="of the UNet"
        )
        if run is forward:
            command.add_argument(
                "--against", default="", choices=["", "torch"], help="what to compare with"
            )
        if run is sample:
            command.add_argument(
                "--teacher_steps",
                type=int,
                default=0,
                help="of the teacher; all the config's if not given",
            )

    command = add(features)
    command.add_argument(
        "--features", default="inception", choices=list(features_lib.NETWORKS), help="the network"
    )
    command.add_argument("--images", type=int, default=64, help="of each run")
    command.add_argument(
        "--size",
        type=int,
        default=0,
        help="height and width of the images; 0 = those that the network takes",
    )
    command.add_argument("--batch_size", type=int, default=16, help="over all devices")
    command.add_argument(
        "--repeats", type=int, default=3, help="to be timed, after one that is not"
    )
    command.add_argument(
        "--against", default="", choices=["", "torch"], help="what to compare with"
    )
    add(memory).add_argument(
        "--images", type=int, default=50_000, help="whose statistics are taken"
    )
    return parser.parse_args(argv)


def main():
    arguments = parse(sys.argv[1:])
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
