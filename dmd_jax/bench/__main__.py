"""Benchmarks of a config's own networks at their real size, with random weights.

python -m dmd_jax.bench step --config=cifar10 --batch_size=2
python -m dmd_jax.bench step --config=cifar10 --batch_size=2 --against=torch
python -m dmd_jax.bench forward --config=coco --against=torch
python -m dmd_jax.bench sample --config=coco --teacher_steps=3
python -m dmd_jax.bench stack --config=coco
python -m dmd_jax.bench features --features=inception --against=torch
python -m dmd_jax.bench memory --count=50000
python -m dmd_jax.bench records --need=64
python -m dmd_jax.bench captions --need=64

`step` prints parameters, memory and seconds of the DMD step; and the time that the step's own
convolutions and matrix products take alone, one after another. `--against=torch` times the same
step in PyTorch in turn with ours: same network, losses, optimizers and batch. `forward` does so
with the UNet of Stable Diffusion and diffusers', with the same weights, and prints how far apart
they are. `sample` times one step against the teacher's sampler, `stack` against one step of two
UNets in series. `features` times a feature network of evaluations as `forward` does the UNet;
`memory` prints the memory that the statistics of many images take.

`records` reads pairs of configs/coco.py (noise and latents 64x64x4, embeddings 77x768) as a
training stage does. `captions` reads JPEG files like COCO's as the stage does that encodes them.
`--need` is the number of rows that a step asks of one process in a second: its images, over its
seconds, over the processes.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable

from dmd_jax.bench import data, stable_diffusion
from dmd_jax.bench import features as features_lib
from dmd_jax.bench import step as step_lib
from dmd_jax.experiment import build, configs
from dmd_jax.models import clip_text, vae
from dmd_jax.runtime import timing


def forward(arguments: argparse.Namespace):
    """Times the UNet of Stable Diffusion, and compares it with diffusers'."""
    stage = _load_stable_diffusion(arguments)
    result = stable_diffusion.forward(
        stage,
        batch_size=arguments.batch_size,
        repeats=arguments.repeats,
        against=arguments.against,
    )
    print(
        f"jax: {timing.spread(result.seconds)} s a call, "
        f"compiled in {result.compile_seconds:.0f} s; {result.parameters:,} parameters"
    )
    if result.other:
        name, seconds = result.other
        ratios = [b / a for a, b in zip(result.seconds, seconds, strict=True)]
        print(f"{name}: {timing.spread(seconds)} s a call")
        print(f"jax is {timing.spread(ratios)} times as fast")
        print(f"largest difference: {result.difference:.1e} of the largest output")
    print(f"peak memory: {timing.peak_memory()}")


def sample(arguments: argparse.Namespace):
    """Times one step against the teacher's sampler, from texts to images."""
    stage = _load_stable_diffusion(arguments)
    times = stable_diffusion.sample(
        stage,
        *_text_encoder_and_decoder(arguments, stage),
        batch_size=arguments.batch_size,
        teacher_steps=arguments.teacher_steps,
        repeats=arguments.repeats,
    )
    print(f"text encoder: {timing.spread(times.text)} s; decoder: {timing.spread(times.decoder)} s")
    print(f"one step: {timing.spread(times.one_step)} s")
    a_call = [seconds / times.calls for seconds in times.teacher]
    print(
        f"teacher, {times.calls} guided calls: {timing.spread(times.teacher)} s, "
        f"{timing.spread(a_call)} s a call"
    )
    if times.nfe != times.calls:
        print(f"below, the teacher's {times.nfe} calls are extrapolated from {times.calls}")
    teacher = [times.nfe / times.calls * seconds for seconds in times.teacher]
    networks, images = _ratios(times, times.one_step, teacher)
    print(
        f"one step is {timing.spread(images)} times as fast from text to image; "
        f"the network alone {timing.spread(networks)}"
    )
    print(f"peak memory: {timing.peak_memory()}")


def stack(arguments: argparse.Namespace):
    """Times one step of one UNet against one of two in series, from texts to images."""
    stage = _load_stable_diffusion(arguments)
    times = stable_diffusion.stack(
        stage,
        *_text_encoder_and_decoder(arguments, stage),
        batch_size=arguments.batch_size,
        repeats=arguments.repeats,
    )
    one, two = times.parameters
    print(f"text encoder: {timing.spread(times.text)} s; decoder: {timing.spread(times.decoder)} s")
    print(f"one UNet, {one:,} parameters: {timing.spread(times.one)} s")
    print(f"two in series, {two:,} parameters: {timing.spread(times.two)} s")
    networks, images = _ratios(times, times.one, times.two)
    print(
        f"two take {timing.spread(images)} times as long from text to image; "
        f"the network alone {timing.spread(networks)}"
    )
    print(f"peak memory: {timing.peak_memory()}")


def features(arguments: argparse.Namespace):
    """Times a feature network, and compares it with PyTorch's."""
    if min(arguments.count, arguments.batch_size, arguments.repeats) < 1 or arguments.size < 0:
        raise ValueError(
            "expected --count, --batch_size and --repeats of at least 1, and --size of at least 0."
        )
    print(timing.devices(), flush=True)
    times = features_lib.features(
        arguments.features,
        count=arguments.count,
        size=arguments.size,
        batch_size=arguments.batch_size,
        repeats=arguments.repeats,
        against=arguments.against,
    )
    ours = [arguments.count / seconds for seconds in times.seconds]
    theirs = [arguments.count / seconds for seconds in times.other]
    print(f"{arguments.features}, {arguments.count} images in batches of {arguments.batch_size}")
    print(f"jax: {timing.spread(ours)} images/s")
    if theirs:
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        print(f"torch: {timing.spread(theirs)} images/s")
        print(f"jax is {timing.spread(ratios)} times as fast")
        print(f"largest difference: {times.difference:.1e} of the largest feature")


def memory(arguments: argparse.Namespace):
    """Prints the memory that the statistics of many images take."""
    if arguments.count < 2:
        raise ValueError(f"count is {arguments.count}; expected at least 2.")
    print(timing.devices(), flush=True)
    cost = features_lib.statistics(arguments.count)
    print(
        f"{arguments.count} images of 32x32 pixels, {features_lib.DIMENSIONS} features: "
        f"{cost.seconds:.0f} s"
    )
    print(f"peak memory: {cost.peak:.0f} MB, {cost.peak - cost.start:.0f} MB more than before")


def records(arguments: argparse.Namespace):
    """Times batches of records, from the files to the devices."""
    _start_data(arguments, "count", "repeats", "batch_size")
    rates = data.records(
        count=arguments.count, batch_size=arguments.batch_size, repeats=arguments.repeats
    )
    _print_rates(rates, arguments.need)


def captions(arguments: argparse.Namespace):
    """Times JPEG files of 640x480 pixels with captions, decoded, cropped and resized."""
    _start_data(arguments, "count", "repeats", "size")
    for rates in data.captions(
        count=arguments.count, size=arguments.size, repeats=arguments.repeats
    ):
        _print_rates(rates, arguments.need)


def _ratios(times, first, second):
    """Returns how much longer `second` takes than `first`, alone and from text to image."""
    networks = [b / a for a, b in zip(first, second, strict=True)]
    images = [
        (text + b + decoder) / (text + a + decoder)
        for text, a, b, decoder in zip(times.text, first, second, times.decoder, strict=True)
    ]
    return networks, images


def _load_stable_diffusion(arguments):
    """Loads the teacher of a config, and prints the first lines."""
    if min(arguments.repeats, arguments.batch_size) < 1:
        raise ValueError(
            f"repeats is {arguments.repeats} and batch_size {arguments.batch_size}; "
            "expected at least 1."
        )
    config = configs.load(arguments.config)
    if config.network.name != "unet_sd.unet":
        raise ValueError(
            f"the network of {arguments.config} is {config.network.name}, "
            "expected unet_sd.unet; use --config=coco."
        )
    config.network.dtype = arguments.dtype
    print(timing.devices())
    print(f"{arguments.config}, {config.network.dtype}, batch {arguments.batch_size}", flush=True)
    return build.stages(config)["teacher"]


def _text_encoder_and_decoder(arguments, stage):
    """Makes the text encoder and the autoencoder of Stable Diffusion."""
    if stage.run.text["name"] != "clip":
        raise ValueError(
            f"{arguments.config} takes its texts from {stage.run.text['name']}, expected clip; "
            "use --config=coco."
        )
    width = stage.run.network["cross_attention_dim"]
    encoder = clip_text.clip(
        hidden_size=width, intermediate_size=4 * width, num_heads=max(width // 64, 1)
    )
    return encoder, vae.kl(latent_channels=stage.run.network["channels"])


def _start_data(arguments, *counts):
    """Checks the counts, and prints the first line."""
    for name in counts:
        value = getattr(arguments, name)
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1.")
    print(f"{timing.devices()}, {os.cpu_count()} cores")


def _print_rates(rates, need):
    median = statistics.median(rates.per_second)
    print(
        f"{rates.name}: {timing.spread(rates.per_second)} {rates.unit} a second, "
        f"{median * rates.size / 1e6:.0f} MB/s; {rates.size / 1e3:.0f} kB each"
    )
    if need:
        print(
            f"the devices need {need:g} {rates.unit} a second: "
            f"{rates.name} gives {median / need:.2f} times that"
        )


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dmd_jax.bench", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(required=True)
    _add_step(commands)
    for run in (forward, sample, stack):
        command = _add(commands, run)
        _add_config(command, "coco")
        command.add_argument("--batch_size", type=int, default=1, help="images, over all devices")
        _add_repeats(command)
        command.add_argument(
            "--dtype", default="float32", choices=["float32", "bfloat16"], help="of the UNet"
        )
        if run is forward:
            _add_against(command)
        if run is sample:
            command.add_argument(
                "--teacher_steps",
                type=int,
                default=0,
                help="steps of the teacher's sampler; 0 = the config's number",
            )
    _add_features(commands)
    _add(commands, memory).add_argument(
        "--count", type=int, default=50_000, help="number of images"
    )
    for run, count in ((records, 2000), (captions, 200)):
        command = _add(commands, run)
        command.add_argument(
            "--count", type=int, default=count, help="rows that are written and read"
        )
        command.add_argument("--repeats", type=int, default=3, help="number of timings")
        command.add_argument(
            "--need",
            type=float,
            default=0.0,
            help="rows a second that the devices of one process need; 0 = unknown",
        )
        if run is records:
            command.add_argument("--batch_size", type=int, default=32, help="rows of a batch")
        else:
            command.add_argument(
                "--size", type=int, default=512, help="height and width of the images in pixels"
            )
    return parser.parse_args(argv)


def _add(commands, run: Callable) -> argparse.ArgumentParser:
    command = commands.add_parser(run.__name__, help=run.__doc__)
    command.set_defaults(run=run)
    return command


def _add_step(commands):
    command = _add(commands, step_lib.step)
    _add_config(command, "cifar10")
    command.add_argument(
        "--batch_size",
        type=int,
        default=2,
        help="fresh images, and as many pairs, over all devices",
    )
    command.add_argument(
        "--steps", type=int, default=5, help="number of timings, after one step that is not timed"
    )
    _add_against(command)
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
        "--no_alone",
        dest="alone",
        action="store_false",
        help="do not time convolutions and matrix products alone",
    )


def _add_features(commands):
    command = _add(commands, features)
    command.add_argument(
        "--features", default="inception", choices=list(features_lib.NETWORKS), help="the network"
    )
    command.add_argument("--count", type=int, default=64, help="number of images in each run")
    command.add_argument(
        "--size",
        type=int,
        default=0,
        help="height and width of the images; 0 = those that the network takes",
    )
    command.add_argument("--batch_size", type=int, default=16, help="images, over all devices")
    _add_repeats(command)
    _add_against(command)


def _add_config(command, default):
    command.add_argument(
        "--config",
        default=default,
        help="a name of a config, such as fashion_mnist:small",
    )


def _add_repeats(command):
    command.add_argument(
        "--repeats", type=int, default=3, help="number of timings, after one run that is not timed"
    )


def _add_against(command):
    command.add_argument(
        "--against", default="", choices=["", "torch"], help="what it is compared with"
    )


def main():
    """Runs a benchmark."""
    arguments = parse(sys.argv[1:])
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
