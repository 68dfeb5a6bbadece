"""What the benchmarks share: inputs and weights at random, and how time and memory are told."""

import json
import pathlib
import resource
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import safetensors.numpy

from dmd_jax import experiment
from dmd_jax.models import vae, vgg
from dmd_jax.weights import convert

LENGTH = 77  # tokens of a text where the config does not say
TAESD = dict(_class_name="AutoencoderTiny", encoder_block_out_channels=(64,) * 4, decoder_block_out_channels=(64,) * 4)
TAESD |= dict(num_encoder_blocks=(1, 3, 3, 3), num_decoder_blocks=(3, 3, 3, 1))


def random_cond(config, n: int) -> np.ndarray:
    """Labels [n], or embeddings of texts [n, L, D]."""
    if "text" not in config:
        return np.arange(n, dtype=np.int32) % 10
    shape = n, config.text.get("length", LENGTH), config.network.cross_attention_dim
    return np.random.default_rng(1).standard_normal(shape, np.float32).astype(np.float16)


def random_batch(config, n: int) -> dict:
    """Noise in place of images and texts."""
    rng = np.random.default_rng(0)
    shape, cond = (n, *experiment.image_shape(config)), random_cond(config, n)
    pairs = {"noise": rng.standard_normal(shape, np.float32), "image": np.tanh(rng.standard_normal(shape, np.float32)), "cond": cond}
    return {"fresh": {"cond": cond}, "pairs": pairs}


def random_params(abstract: dict) -> dict:
    """Weights on the device, made one array after another. None of them is 0, unlike in a fresh network."""
    rng = np.random.default_rng(0)

    def draw(path, a):
        x = rng.standard_normal(a.shape, np.float32)
        x *= {"kernel": np.prod(a.shape[:-1]) ** -0.5, "scale": 0.2, "bias": 0.1, "embedding": 0.02}[path[-1].key]
        return jax.device_put(1 + x if path[-1].key == "scale" else x)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def write_files(config, directory: pathlib.Path):
    """What the stage `dmd` reads besides its teacher, at random: LPIPS, the TAESD before it, the null condition. `config` then names it."""
    if "dmd" not in config:
        raise ValueError("the config has no stage 'dmd'; use another variant.")
    distance = config.dmd.recipe.distance
    if "weights" in distance:
        distance.weights = str(directory / "lpips.npz")
        np.savez(distance.weights, **convert.to_torch(vgg.make().init(0)))
    if "checkpoint" in distance.get("decoder", {}):
        distance.decoder.checkpoint, channels = str(directory), config.network.channels
        (directory / "vae").mkdir()
        (directory / "vae/config.json").write_text(json.dumps(TAESD | {"latent_channels": channels}))
        tensors = convert.to_torch(vae.tiny(latent_channels=channels).init(0))
        safetensors.numpy.save_file(tensors, directory / "vae/diffusion_pytorch_model.safetensors")
    if isinstance(config.null_cond, str):
        path = pathlib.Path(config.null_cond.format(workdir=directory))
        path.parent.mkdir()
        np.save(path, random_cond(config, 1)[0])


def timed(function: Callable) -> tuple:
    """Seconds that a call takes, and its result."""
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def devices() -> str:
    """What the benchmark runs on."""
    return f"device: {jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"


def peak_memory() -> str:
    """Of the device, or of the process where the device does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return f"{stats.get('peak_bytes_in_use', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30:.1f} GiB"
