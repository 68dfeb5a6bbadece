"""Random data, weights and files, for where only their shapes matter."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from dmd_jax.experiment import build, settings
from dmd_jax.models import lpips, vae
from dmd_jax.weights import state_dict

LENGTH = 77  # tokens of a text where the config does not say
TAESD = dict(
    _class_name="AutoencoderTiny",
    encoder_block_out_channels=(64,) * 4,
    decoder_block_out_channels=(64,) * 4,
)
TAESD |= dict(num_encoder_blocks=(1, 3, 3, 3), num_decoder_blocks=(3, 3, 3, 1))
KL = dict(
    _class_name="AutoencoderKL",
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    norm_num_groups=32,
)
KL |= dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)


def random_cond(run: settings.Run, n: int) -> np.ndarray:
    """Draws labels [n], or embeddings of texts [n, L, D]."""
    if run.text is None:
        return np.arange(n, dtype=np.int32) % 10
    shape = n, run.text.get("length", LENGTH), run.network["cross_attention_dim"]
    return np.random.default_rng(1).standard_normal(shape, np.float32).astype(np.float16)


def random_batch(stage: build.Stage, n: int) -> dict:
    """Draws a batch for a training stage, `n` rows of each of its streams."""
    rng = np.random.default_rng(0)
    shape = n, *stage.image_shape
    noise = rng.standard_normal(shape, np.float32)
    image = np.tanh(rng.standard_normal(shape, np.float32))
    rows = {"noise": noise, "image": image, "cond": random_cond(stage.run, n)}
    streams = build.method(stage).STREAMS
    return {stream: {field: rows[field] for field in fields} for stream, fields in streams.items()}


def batch_sizes(stage: build.Stage) -> dict[str, int]:
    """Returns the batch size of each stream of a training stage, over all devices."""
    return {
        name: source.get("batch_size", stage.settings.batch_size)
        for name, source in stage.settings.data.items()
    }


def random_params(abstract: dict) -> dict:
    """Draws weights on the device; none is 0, unlike in a fresh network."""
    rng = np.random.default_rng(0)

    def draw(path, a):
        x = rng.standard_normal(a.shape, np.float32)
        x *= {
            "kernel": np.prod(a.shape[:-1]) ** -0.5,
            "scale": 0.2,
            "bias": 0.1,
            "embedding": 0.02,
        }[path[-1].key]
        return jax.device_put(1 + x if path[-1].key == "scale" else x)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def write_files(stage: build.Stage, directory: pathlib.Path) -> build.Stage:
    """Writes what a training stage reads besides its data, at random.

    It is LPIPS, the decoder before it, and the condition that stands for none.

    Returns:
      The stage, which names the files.
    """
    recipe = dict(stage.settings.recipe)
    distance = dict(recipe.get("distance", {}))
    if "weights" in distance:
        distance["weights"] = str(directory / "lpips.npz")
        tensors: Any = state_dict.to_torch(lpips.make().init(0))
        np.savez(distance["weights"], **tensors)
    if "checkpoint" in (distance.get("decoder") or {}):
        tiny = distance["decoder"]["checkpoint"] == stage.run.variables.get("taesd")
        distance["decoder"] = distance["decoder"] | {"checkpoint": str(directory)}
        channels = stage.run.network["channels"]
        (directory / "vae").mkdir()
        (directory / "vae/config.json").write_text(
            json.dumps((TAESD if tiny else KL) | {"latent_channels": channels})
        )
        decoder = (vae.tiny if tiny else vae.kl)(latent_channels=channels)
        tensors = state_dict.to_torch(decoder.init(0))
        safetensors.numpy.save_file(tensors, directory / "vae/diffusion_pytorch_model.safetensors")
    if distance:
        recipe["distance"] = distance
    if isinstance(stage.run.null_cond, str):
        path = pathlib.Path(stage.run.null_cond.format(workdir=directory))
        path.parent.mkdir()
        np.save(path, random_cond(stage.run, 1)[0])
    return stage.changed(recipe=recipe)
