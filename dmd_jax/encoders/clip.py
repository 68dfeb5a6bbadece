"""The text encoder of Stable Diffusion: CLIP's last hidden states, after the final norm."""

import os

from dmd_jax import encoders, sharding
from dmd_jax.encoders import tokenizer
from dmd_jax.models import clip_text
from dmd_jax.weights import diffusers, digests, state_dict


def make(
    parallel: sharding.Parallel,
    *,
    checkpoint: str | os.PathLike,
    batch_size: int = 32,
    dtype: str = "float32",
) -> encoders.Encoder:
    """Returns the encoder of a checkpoint.

    Args:
      parallel: the devices.
      checkpoint: a directory in the layout of diffusers, with tokenizer/ and text_encoder/, or
        owner/name on the Hugging Face hub.
      batch_size: number of prompts, over all devices.
      dtype: inside the network.

    Raises:
      ValueError: files are missing, damaged or of another network, or the devices cannot share a
        batch.
    """
    directory = diffusers.find(checkpoint)
    settings, tensors = diffusers.text_encoder(directory)
    length = settings["max_length"]
    width = settings["hidden_size"]
    tokens = tokenizer.load(directory / "tokenizer", length=length)
    network = clip_text.clip(**settings, dtype=dtype)
    params = state_dict.from_torch(tensors, network.abstract)
    run = parallel.in_batches("text batch_size", network.apply, batch_size)
    identity = f"{digests.of_params(params)} {tokens.digest} {sorted(settings.items())} {dtype}"
    params = sharding.place(params, parallel.replicated)

    def encode(prompts):
        return run(params, tokens.ids(prompts))

    return encoders.Encoder(
        encode, (length, width), encoders.digest(f"clip {identity}"), tokens.truncated
    )
