"""Stable Diffusion at its real size: the UNet beside diffusers', one step beside the teacher's many and beside that of two UNets in series.

Weights are random. What is returned is printed by `bench.py`.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np

from dmd_jax import generate, lookup, sharding
from dmd_jax.experiment import build
from dmd_jax.models import layers
from dmd_jax.plan import random_inputs
from dmd_jax.runtime import timing


class Forward(NamedTuple):
    """What `forward` found.

    Attributes:
      parameters: how many.
      compile_seconds: of ours.
      seconds: of each call of ours.
      other: the name of what it was compared with, and its seconds; None for nothing.
      difference: the largest, relative to the largest output of the other.
    """

    parameters: int
    compile_seconds: float
    seconds: list[float]
    other: tuple[str, list[float]] | None
    difference: float


def forward(config, *, batch_size: int, repeats: int, against: str) -> Forward:
    """The UNet of `config` on noise, and diffusers' in turn with it if `against` is "torch".

    Raises:
      ValueError: something is not finite, or diffusers is missing.
    """
    network, rng = build.make_network(config), np.random.default_rng(0)
    params = random_inputs.random_params(network.abstract)
    x = rng.standard_normal((batch_size, *build.image_shape(config)), np.float32)
    inputs = (
        x,
        np.linspace(999, 1, batch_size, dtype=np.float32),
        random_inputs.random_cond(config, batch_size).astype(np.float32),
    )
    compile_seconds, program = timing.timed(
        lambda: jax.jit(network.apply).lower(params, *inputs).compile()
    )
    output = np.asarray(program(params, *inputs))
    other, difference = None, 0.0
    if against:
        try:
            from dmd_jax.bench import torch_unet
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f'--against=torch needs diffusers ({error}); run: pip install "dmd_jax[torch]"'
            ) from error
        other = torch_unet.unet(config.network.to_dict(), params, inputs)
        expected = other().cpu().numpy()
        difference = float(np.abs(output - expected).max() / np.abs(expected).max())
    if not np.isfinite(output).all() or not math.isfinite(difference):
        raise ValueError("the output is not finite.")
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(timing.timed(lambda: jax.block_until_ready(program(params, *inputs)))[0])
        theirs += [timing.timed(other)[0]] if other else []
    count = sum(a.size for a in jax.tree.leaves(params))
    return Forward(
        count,
        compile_seconds,
        ours,
        (f"torch {torch_unet.VERSION}", theirs) if other else None,
        difference,
    )


class Sampled(NamedTuple):
    """What `sample` found: seconds of each run, and network calls.

    Attributes:
      text: of the text encoder.
      one_step: of the one-step generator.
      teacher: of the teacher.
      decoder: of the decoder.
      calls: of the teacher's network in these seconds.
      nfe: of the teacher's network for an image.
    """

    text: list[float]
    one_step: list[float]
    teacher: list[float]
    decoder: list[float]
    calls: int
    nfe: int


def sample(
    config,
    encoder: layers.Network,
    decoder: layers.Network,
    *,
    batch_size: int,
    teacher_steps: int,
    repeats: int,
) -> Sampled:
    """Images of texts by one step and by the teacher's sampler, each part on its own and in turn, after one run that compiles.

    Args:
      config: of a network of texts.
      encoder: of texts, `(params, ids [B, L]) -> cond`.
      decoder: of latents.
      batch_size: texts at once, over all devices.
      teacher_steps: of the teacher's sampler; 0 for all that the config has.
      repeats: runs that are timed.

    Raises:
      ValueError: the batch or the steps do not fit, or something is not finite.
    """
    parallel = sharding.Parallel(sharding.make_mesh(**config.mesh))
    encode, inputs, decode = _around(config, encoder, decoder, parallel, batch_size)
    denoiser, params = (
        build.make_denoiser(config),
        _random_params(build.make_network(config), parallel),
    )
    settings, null = config.teacher.sampler.to_dict(), inputs["cond"][0]
    nfe = build.build_sampler(denoiser, settings, null, "teacher.sampler").nfe
    teacher = build.build_sampler(
        denoiser,
        settings | ({"num_steps": teacher_steps} if teacher_steps else {}),
        null,
        "teacher_steps",
    )
    one_step = build.build_sampler(denoiser, {"name": "one_step"}, None, "one_step")
    by_one_step, by_teacher = (
        generate.make_sample(sampler, parallel, batch_size) for sampler in (one_step, teacher)
    )
    parts = encode, lambda: by_one_step(params, inputs), lambda: by_teacher(params, inputs), decode
    return Sampled(*_in_turn(parts, repeats), calls=teacher.nfe, nfe=nfe)


class Stacked(NamedTuple):
    """What `stack` found: seconds of each run, and how many parameters there are.

    Attributes:
      text: of the text encoder.
      one: of one step of one UNet.
      two: of one step of two in series.
      decoder: of the decoder.
      parameters: of one and of two.
    """

    text: list[float]
    one: list[float]
    two: list[float]
    decoder: list[float]
    parameters: tuple[int, int]


def stack(
    config, encoder: layers.Network, decoder: layers.Network, *, batch_size: int, repeats: int
) -> Stacked:
    """Images of texts by one step of one UNet and of two in series, timed as in `sample`. The one shares its weights with the two.

    Args:
      config: of a UNet of Stable Diffusion.
      encoder: of texts, `(params, ids [B, L]) -> cond`.
      decoder: of latents.
      batch_size: texts at once, over all devices.
      repeats: runs that are timed.

    Raises:
      ValueError: the batch does not fit, or something is not finite.
    """
    parallel = sharding.Parallel(sharding.make_mesh(**config.mesh))
    encode, inputs, decode = _around(config, encoder, decoder, parallel, batch_size)

    settings = config.network.to_dict()
    make = lookup.find("models", settings.pop("name"))
    networks = [make(**settings | {"stack": units}) for units in (1, 2)]
    two = _random_params(networks[1], parallel)
    one = two["units"]["1"] | two["units"]["0"]

    def step(network, params):
        denoiser = dataclasses.replace(build.make_denoiser(config), network=network.apply)
        sampler = build.build_sampler(denoiser, {"name": "one_step"}, None, "one_step")
        sample = generate.make_sample(sampler, parallel, batch_size)
        return lambda: sample(params, inputs)

    times = _in_turn((encode, *map(step, networks, (one, two)), decode), repeats)
    return Stacked(
        *times,
        parameters=tuple(sum(a.size for a in jax.tree.leaves(params)) for params in (one, two)),
    )


def _around(config, encoder, decoder, parallel, batch_size):
    """A function that encodes texts, the inputs of a sampler with what it makes, and a function that decodes latents."""
    texts, latents = (_random_params(network, parallel) for network in (encoder, decoder))
    encode, decode = (
        parallel.in_batches("batch_size", network.apply, batch_size)
        for network in (encoder, decoder)
    )
    ids = np.random.default_rng(0).integers(0, 1000, (batch_size, random_inputs.LENGTH), np.int32)
    cond = encode(texts, ids)
    inputs = generate.inputs(
        0, range(batch_size), build.image_shape(config), [{"cond": row} for row in cond]
    )
    return lambda: encode(texts, ids), inputs, lambda: decode(latents, inputs["z"])


def _random_params(network, parallel):
    return jax.device_put(random_inputs.random_params(network.abstract), parallel.replicated)


def _in_turn(parts, repeats):
    """The seconds of each part, one part after another, again and again, after a run that compiles."""
    if not all(np.isfinite(part()).all() for part in parts):
        raise ValueError("an output is not finite.")
    return timing.in_turn(parts, repeats)
