"""What stands in for the data, the weights and the files of others where only their shapes matter: all of it at random."""

import json
import pathlib

import jax
import numpy as np
import safetensors.numpy

from dmd_jax.experiment import build
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
STREAMS = {
    "fresh": ("cond",),
    "pairs": ("noise", "image", "cond"),
    "images": ("image", "cond"),
}  # what recipes read of each


def random_cond(config, n: int) -> np.ndarray:
    """Labels [n], or embeddings of texts [n, L, D]."""
    if "text" not in config:
        return np.arange(n, dtype=np.int32) % 10
    shape = n, config.text.get("length", LENGTH), config.network.cross_attention_dim
    return np.random.default_rng(1).standard_normal(shape, np.float32).astype(np.float16)


def random_batch(config, stage: str, n: int) -> dict:
    """A batch for a training stage, `n` of each of its streams: noise in place of images and texts."""
    rng = np.random.default_rng(0)
    shape = n, *build.image_shape(config)
    noise, image = (rng.standard_normal(shape, np.float32) for _ in range(2))
    rows = {"noise": noise, "image": np.tanh(image), "cond": random_cond(config, n)}
    return {
        stream: {field: rows[field] for field in STREAMS[stream]} for stream in config[stage].data
    }


def batch_sizes(config, stage: str) -> dict[str, int]:
    """Of each stream of a training stage, over all devices."""
    return {
        name: settings.get("batch_size", config[stage].batch_size)
        for name, settings in config[stage].data.items()
    }


def random_params(abstract: dict) -> dict:
    """Weights on the device, made one array after another. None of them is 0, unlike in a fresh network."""
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


def write_files(config, stage: str, directory: pathlib.Path):
    """What a training stage reads besides its data, at random: LPIPS, the decoder before it, the null condition. `config` then names it.

    Raises:
      ValueError: there is no such stage.
    """
    training = [name for name in config.stages if "recipe" in config[name]]
    if stage not in training:
        raise ValueError(f"the config trains no stage {stage!r}; there are: {', '.join(training)}.")
    distance = config[stage].recipe.get("distance", {})
    if "weights" in distance:
        distance.weights = str(directory / "lpips.npz")
        np.savez(distance.weights, **state_dict.to_torch(lpips.make().init(0)))
    if "checkpoint" in distance.get("decoder", {}):
        tiny = distance.decoder.checkpoint == config.get("taesd")
        distance.decoder.checkpoint, channels = str(directory), config.network.channels
        (directory / "vae").mkdir()
        (directory / "vae/config.json").write_text(
            json.dumps((TAESD if tiny else KL) | {"latent_channels": channels})
        )
        tensors = state_dict.to_torch(
            (vae.tiny if tiny else vae.kl)(latent_channels=channels).init(0)
        )
        safetensors.numpy.save_file(tensors, directory / "vae/diffusion_pytorch_model.safetensors")
    if isinstance(config.null_cond, str):
        path = pathlib.Path(config.null_cond.format(workdir=directory))
        path.parent.mkdir()
        np.save(path, random_cond(config, 1)[0])
