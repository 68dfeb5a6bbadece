"""Stable Diffusion at its real size, with random weights.

The UNet is timed beside diffusers' UNet; one step beside the teacher's many steps, and beside one
step of two UNets in series.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np

from dmd_jax import generate, lookup
from dmd_jax.experiment import build
from dmd_jax.models import layers
from dmd_jax.plan import random_inputs
from dmd_jax.runtime import timing


class Forward(NamedTuple):
    """Times of the UNet.

    Attributes:
      parameters: their number.
      compile_seconds: of our UNet.
      seconds: of each call of our UNet.
      other: name and seconds of the UNet that it is compared with; None if there is none.
      difference: the largest difference, relative to the largest output of the other UNet.
    """

    parameters: int
    compile_seconds: float
    seconds: list[float]
    other: tuple[str, list[float]] | None
    difference: float


def forward(stage: build.Stage, *, batch_size: int, repeats: int, against: str) -> Forward:
    """Times the UNet of a stage on noise, in turn with diffusers' if `against` is "torch".

    Raises:
      ValueError: something is not finite, or diffusers is missing.
    """
    network = stage.network
    params = random_inputs.random_params(network.abstract)
    shape = (batch_size, *stage.image_shape)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    noise = np.linspace(999, 1, batch_size, dtype=np.float32)
    cond = random_inputs.random_cond(stage.run, batch_size).astype(np.float32)
    inputs = (x, noise, cond)
    compile_seconds, program = timing.timed(
        lambda: jax.jit(network.apply).lower(params, *inputs).compile()
    )
    functions = [lambda: jax.block_until_ready(program(params, *inputs))]
    output = np.asarray(program(params, *inputs))
    difference = 0.0
    if against:
        try:
            from dmd_jax.bench import torch_unet
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f'--against=torch needs diffusers ({error}); run: pip install "dmd_jax[torch]"'
            ) from error
        functions.append(torch_unet.unet(stage.model.network, params, inputs))
        expected = functions[1]().cpu().numpy()
        difference = float(np.abs(output - expected).max() / np.abs(expected).max())
    if not np.isfinite(output).all() or not math.isfinite(difference):
        raise ValueError("the output is not finite.")
    seconds = timing.in_turn(functions, repeats)
    return Forward(
        parameters=_count(params),
        compile_seconds=compile_seconds,
        seconds=seconds[0],
        other=(f"torch {torch_unet.VERSION}", seconds[1]) if against else None,
        difference=difference,
    )


class Sampled(NamedTuple):
    """Times of one step and of the teacher's sampler, in seconds of each run.

    Attributes:
      text: seconds of the text encoder.
      one_step: seconds of the one-step generator.
      teacher: seconds of the teacher's sampler.
      decoder: seconds of the decoder.
      calls: network calls in the seconds of `teacher`.
      nfe: network calls of the teacher for an image.
    """

    text: list[float]
    one_step: list[float]
    teacher: list[float]
    decoder: list[float]
    calls: int
    nfe: int


def sample(
    stage: build.Stage,
    encoder: layers.Network,
    decoder: layers.Network,
    *,
    batch_size: int,
    teacher_steps: int,
    repeats: int,
) -> Sampled:
    """Times images of texts, by one step and by the teacher's sampler.

    Each part runs on its own and in turn with the others, after one run that compiles.

    Args:
      stage: a teacher, of a network whose conditions are texts.
      encoder: of texts, `(params, ids [B, L]) -> cond`.
      decoder: of latents.
      batch_size: texts at once, over all devices.
      teacher_steps: of the teacher's sampler; 0 for the stage's number.
      repeats: runs that are timed.

    Raises:
      ValueError: the batch or the steps do not fit, or something is not finite.
    """
    parallel = build.parallel(stage)
    encode, inputs, decode = _around(stage, encoder, decoder, parallel, batch_size)
    denoiser = stage.denoiser
    params = _random_params(stage.network, parallel)
    settings = dict(stage.settings.sampler)
    null_cond = inputs["cond"][0]
    nfe = build.guided_sampler(denoiser, settings, null_cond, "teacher.sampler").nfe
    if teacher_steps:
        settings["num_steps"] = teacher_steps
    teacher = build.guided_sampler(denoiser, settings, null_cond, "teacher_steps")
    one_step = build.guided_sampler(denoiser, {"name": "one_step"}, None, "one_step")
    sample_one_step = generate.make_sample(one_step, parallel, batch_size)
    sample_teacher = generate.make_sample(teacher, parallel, batch_size)
    parts = (
        encode,
        lambda: sample_one_step(params, inputs),
        lambda: sample_teacher(params, inputs),
        decode,
    )
    text, one_step, steps, decoder = _in_turn(parts, repeats)
    return Sampled(text, one_step, steps, decoder, teacher.nfe, nfe)


class Stacked(NamedTuple):
    """Times of one UNet and of two in series, in seconds of each run.

    Attributes:
      text: seconds of the text encoder.
      one: seconds of one step of one UNet.
      two: seconds of one step of two UNets in series.
      decoder: seconds of the decoder.
      parameters: their number, in one UNet and in two.
    """

    text: list[float]
    one: list[float]
    two: list[float]
    decoder: list[float]
    parameters: tuple[int, int]


def stack(
    stage: build.Stage,
    encoder: layers.Network,
    decoder: layers.Network,
    *,
    batch_size: int,
    repeats: int,
) -> Stacked:
    """Times images of texts by one step of one UNet and of two in series, as `sample` does.

    The one UNet shares its weights with the two.

    Args:
      stage: of a UNet of Stable Diffusion.
      encoder: of texts, `(params, ids [B, L]) -> cond`.
      decoder: of latents.
      batch_size: texts at once, over all devices.
      repeats: runs that are timed.

    Raises:
      ValueError: the batch does not fit, or something is not finite.
    """
    parallel = build.parallel(stage)
    encode, inputs, decode = _around(stage, encoder, decoder, parallel, batch_size)

    settings = dict(stage.model.network)
    make = lookup.find("models", settings.pop("name"))
    networks = [make(**settings | {"stack": units}) for units in (1, 2)]
    two = _random_params(networks[1], parallel)
    one = two["units"]["1"] | two["units"]["0"]

    def step(network, params):
        denoiser = dataclasses.replace(stage.denoiser, network=network.apply)
        sampler = build.guided_sampler(denoiser, {"name": "one_step"}, None, "one_step")
        sample = generate.make_sample(sampler, parallel, batch_size)
        return lambda: sample(params, inputs)

    parts = (encode, step(networks[0], one), step(networks[1], two), decode)
    text, seconds_one, seconds_two, decoded = _in_turn(parts, repeats)
    return Stacked(text, seconds_one, seconds_two, decoded, (_count(one), _count(two)))


def _around(stage, encoder, decoder, parallel, batch_size):
    """Returns a function that encodes texts, inputs of a sampler, and one that decodes latents."""
    encoder_params = _random_params(encoder, parallel)
    decoder_params = _random_params(decoder, parallel)
    encode = parallel.in_batches("batch_size", encoder.apply, batch_size)
    decode = parallel.in_batches("batch_size", decoder.apply, batch_size)
    ids = np.random.default_rng(0).integers(0, 1000, (batch_size, random_inputs.LENGTH), np.int32)
    conditions = [{"cond": row} for row in encode(encoder_params, ids)]
    inputs = generate.inputs(0, range(batch_size), stage.image_shape, conditions)
    return (
        lambda: encode(encoder_params, ids),
        inputs,
        lambda: decode(decoder_params, inputs["z"]),
    )


def _random_params(network, parallel):
    return jax.device_put(random_inputs.random_params(network.abstract), parallel.replicated)


def _count(params):
    return sum(a.size for a in jax.tree.leaves(params))


def _in_turn(parts, repeats):
    """Times the parts in turn, after a run that compiles."""
    if not all(np.isfinite(part()).all() for part in parts):
        raise ValueError("an output is not finite.")
    return timing.in_turn(parts, repeats)
