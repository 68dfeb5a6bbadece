"""Autoencoders, by their settings in a config: images to what the networks see, and back.

Settings are {"checkpoint": a diffusers directory, ...} for the autoencoder in that directory, or
{"name": ..., ...} for one of dmd_jax/models that has no parameters. None means that there is no
autoencoder: latents are images.
"""

import functools
import json
from collections.abc import Callable

import jax
import numpy as np

from dmd_jax import lookup, sharding
from dmd_jax.models import layers
from dmd_jax.weights import diffusers, state_dict


def load(settings: dict) -> tuple[layers.Network, dict]:
    """Returns the autoencoder, whose `apply` decodes, and its parameters."""
    network, tensors = _open(settings)
    return network, state_dict.from_torch(tensors, network.abstract)


def make_decode(settings: dict | None, parallel: sharding.Parallel, batch_size: int) -> Callable:
    """Returns `latents [N, h, w, c] -> images [N, H, W, C]`, numpy, for any N."""
    if settings is None:
        return lambda latents: latents
    network, params = load(settings)
    return _in_batches("decoding batch_size", network.apply, params, parallel, batch_size)


def make_encode(settings: dict, parallel: sharding.Parallel, batch_size: int) -> Callable:
    """Returns `images [N, H, W, C] -> latents [N, h, w, c]`, numpy, for any N.

    The latents are the mean of the encoder's distribution, scaled.
    """
    network, params = load(settings)

    def encode(params, x):
        return network.bind(params).encode(x)

    return _in_batches("encoding batch_size", encode, params, parallel, batch_size)


def image_shape(settings: dict | None, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns [H, W, C] of the images of latents of `shape`."""
    if settings is None:
        return shape
    return _image_shape(json.dumps(settings), shape)


@functools.cache
def _image_shape(settings, shape):
    network, _ = _open(json.loads(settings))
    latents = jax.ShapeDtypeStruct((1, *shape), np.float32)
    return jax.eval_shape(network.apply, network.abstract, latents).shape[1:]


def _open(settings):
    """Returns the network, and its tensors, which are not read yet."""
    settings = dict(settings)
    checkpoint = settings.pop("checkpoint", "")
    if checkpoint:
        make, tensors = diffusers.vae(diffusers.find(checkpoint))
    else:
        make = lookup.find("models", settings.pop("name"))
        tensors = {}
    return make(**settings), tensors


def _in_batches(name, function, params, parallel, batch_size):
    params = sharding.place(params, parallel.replicated)
    run = parallel.in_batches(name, function, batch_size)
    return lambda arrays: run(params, arrays)
