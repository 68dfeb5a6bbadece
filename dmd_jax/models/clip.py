"""CLIP (Radford et al., arXiv 2103.00020) turns an image and a text into one vector each.

The vectors of an image and a text that belong together point the same way:

    image: W_v norm(ViT([class, patches] + positions))[class]
    text:  W_t norm(Transformer(tokens + positions))[end token]

Attribute names are the keys of transformers' CLIPModel. OpenAI's networks have the activation
quick_gelu, OpenCLIP's own have gelu.
"""

import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dmd_jax.models import clip_text, layers

CHOICES = ("clip",)  # what a config may name

INITIALIZERS = (
    (r"logit_scale$", lambda rng, shape: np.full(shape, np.log(1 / 0.07))),
    (r"class_embedding$", layers.normal(0.02)),
)
INITIALIZERS += clip_text.INITIALIZERS


class ImageEncoder(nnx.Module):
    """See `clip` for the arguments."""

    def __init__(self, *, rngs, image_size, patch_size, hidden_size, dtype, **settings):
        self.image_size = image_size
        norm = functools.partial(layers.layer_norm, hidden_size, rngs=rngs)
        patches = dict(
            kernel_size=(patch_size,) * 2, strides=patch_size, padding="VALID", use_bias=False
        )
        self.embeddings = nnx.Dict(
            class_embedding=nnx.Param(jnp.zeros(hidden_size)),
            patch_embedding=nnx.Conv(3, hidden_size, **patches, dtype=dtype, rngs=rngs),
            position_embedding=nnx.Embed(
                (image_size // patch_size) ** 2 + 1, hidden_size, dtype=dtype, rngs=rngs
            ),
        )
        self.pre_layrnorm = norm(dtype=dtype)  # the checkpoints spell it so
        self.post_layernorm = norm(dtype=jnp.float32)
        self.encoder = clip_text.Transformer(
            rngs=rngs, hidden_size=hidden_size, is_causal=False, dtype=dtype, **settings
        )

    def __call__(self, images):
        if images.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(
                f"images are {images.shape[1:]}, "
                f"expected {self.image_size} x {self.image_size} x 3; resize them."
            )
        x = self.embeddings.patch_embedding(images)
        x = x.reshape(len(x), -1, x.shape[-1])
        first = self.embeddings.class_embedding[...].astype(x.dtype)
        first = jnp.broadcast_to(first, (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1)  # [B, 1 + patches, D]
        x = x + self.embeddings.position_embedding(jnp.arange(x.shape[1]))[None]
        return self.post_layernorm(self.encoder(self.pre_layrnorm(x))[:, 0])


class Clip(nnx.Module):
    """See `clip` for the arguments."""

    def __init__(self, *, rngs, projection_dim, text, vision, dtype):
        self.text_model = clip_text.TextEncoder(rngs=rngs, dtype=dtype, **text)
        self.vision_model = ImageEncoder(rngs=rngs, dtype=dtype, **vision)
        # The projections are float32.
        linear = functools.partial(
            nnx.Linear, out_features=projection_dim, use_bias=False, rngs=rngs
        )
        self.text_projection = linear(text["hidden_size"])
        self.visual_projection = linear(vision["hidden_size"])
        self.logit_scale = nnx.Param(jnp.zeros(()))  # only CLIP's training uses it

    def images(self, images):
        """Returns unit vectors [B, projection_dim], float32.

        Args:
          images: [B, image_size, image_size, 3], normalised.
        """
        return _unit(self.visual_projection(self.vision_model(images)))

    def texts(self, ids):
        """Returns unit vectors [B, projection_dim], float32.

        Args:
          ids: [B, L]; the end token has the largest id, and padding comes after it.
        """
        states = self.text_model(ids)
        pooled = jnp.take_along_axis(states, ids.argmax(axis=-1)[:, None, None], axis=1)[:, 0]
        return _unit(self.text_projection(pooled))

    def __call__(self, images, ids):
        return jnp.sum(self.images(images) * self.texts(ids), axis=-1)


def clip(
    *, projection_dim: int, text: Mapping, vision: Mapping, dtype: str = "float32"
) -> layers.Network:
    """Returns the network `(params, images [B, H, W, 3], ids [B, L]) -> cosines [B]`.

    The module also has `images` and `texts`, which return unit vectors.

    Args:
      projection_dim: length of the vectors.
      text: the arguments of `clip_text.clip`, all but the dtype.
      vision: image_size and patch_size [pixels]; hidden_size, intermediate_size, num_layers,
        num_heads and act as in `text`.
      dtype: inside the towers; the last norms, the projections and the vectors are float32.

    Raises:
      ValueError: an activation is unknown, or sizes do not divide one another.
    """
    for tower in (text, vision):
        clip_text.check(tower)
    if vision["image_size"] % vision["patch_size"]:
        raise ValueError(
            f"image_size {vision['image_size']} is not divisible by "
            f"patch_size {vision['patch_size']}; change one of them."
        )
    settings = dict(
        projection_dim=projection_dim, text=dict(text), vision=dict(vision), dtype=jnp.dtype(dtype)
    )
    return layers.functional(lambda rngs: Clip(rngs=rngs, **settings), INITIALIZERS)


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
