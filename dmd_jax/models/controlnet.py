"""The ControlNet of Stable Diffusion 1.x and 2.x (Zhang et al., arXiv 2302.05543, section 3).

A copy of the UNet's encoder sees the latents x and an image c. Its features pass through 1x1
convolutions Z, which begin as zeros, and are added to what the UNet's decoder sees:

    residuals = scale Z(encoder(conv_in(x) + embedding(c), label, text))

It is diffusers' ControlNetModel, and attribute names are the keys of its checkpoints. A ControlNet
that was made for Stable Diffusion also works with the models that were made from it, of one step or
many.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dmd_jax.models import layers, unet_sd

CHOICES = ("controlnet",)  # what a config may name

INITIALIZERS = (
    (r"^controlnet_(down_blocks|mid_block)\..*kernel$", layers.zeros),
    *unet_sd.INITIALIZERS,
)


class ConditionNet(nnx.Module):
    """Image [B, H, W, 3] to features [B, h, w, c], halved once less than there are `widths`."""

    def __init__(self, c, widths, *, dtype, rngs):
        conv = functools.partial(
            nnx.Conv, kernel_size=(3, 3), padding=unet_sd.PADDING, dtype=dtype, rngs=rngs
        )
        pairs = [(conv(a, a), conv(a, b, strides=2)) for a, b in itertools.pairwise(widths)]
        self.conv_in = conv(3, widths[0])
        self.blocks = layers.numbered(list(itertools.chain(*pairs)))
        self.conv_out = conv(widths[-1], c)

    def __call__(self, image):
        x = nnx.silu(self.conv_in(image))
        for block in layers.in_order(self.blocks):
            x = nnx.silu(block(x))
        return self.conv_out(x)


class ControlNet(nnx.Module):
    """See `controlnet` for the settings."""

    def __init__(self, settings, embedding_widths, rngs):
        dtype = jnp.dtype(settings.dtype)
        zero = functools.partial(nnx.Conv, kernel_size=(1, 1), dtype=dtype, rngs=rngs)
        widths = settings.block_out_channels
        self.run = layers.runner(settings.remat)
        self.time_embedding = unet_sd.time_embedding(settings, rngs)
        self.conv_in = unet_sd.conv_in(settings, rngs)
        self.down_blocks = unet_sd.down_blocks(settings, rngs)
        self.mid_block = unet_sd.mid_block(settings, rngs)
        self.controlnet_cond_embedding = ConditionNet(
            widths[0], embedding_widths, dtype=dtype, rngs=rngs
        )
        self.controlnet_down_blocks = layers.numbered(
            [zero(c, c) for c in unet_sd.skip_channels(settings)]
        )
        self.controlnet_mid_block = zero(widths[-1], widths[-1])

    def __call__(self, x, noise, cond, control, scale):
        x = self.conv_in(x) + self.controlnet_cond_embedding(control)
        emb = unet_sd.embed(self.time_embedding, noise)
        x, skips = unet_sd.encode(self, self.run, x, emb, cond)
        zeros = layers.in_order(self.controlnet_down_blocks)
        skips = [zero(skip) for zero, skip in zip(zeros, skips, strict=True)]
        scale = scale[:, None, None, None]
        return jax.tree.map(
            lambda residual: (scale * residual).astype(residual.dtype),
            (self.controlnet_mid_block(x), skips),
        )


def controlnet(
    *, conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256), **shared
) -> layers.Network:
    """Returns the network that makes the residuals for a `unet_sd.UNet`:

    `(params, x [B, h, w, channels], noise [B], cond [B, L, cross_attention_dim],
    control [B, H, W, 3], scale [B]) -> (residual of the middle, [residual of each skip])`.

    `control` is RGB in [0, 1], and H = h * 2 ** (len(conditioning_embedding_out_channels) - 1): 8 h
    with the defaults, which are those of Stable Diffusion 1.x. The residuals are multiplied by
    `scale`, which is usually 1.

    Args:
      conditioning_embedding_out_channels: of the convolutions that bring the image down to the size
        of the latents.
      shared: fields of `unet_sd.Settings`, as in the UNet.

    Raises:
      ValueError: the settings do not fit each other.
    """
    settings = unet_sd.checked(unet_sd.Settings(**shared))
    return layers.functional(
        lambda rngs: ControlNet(settings, conditioning_embedding_out_channels, rngs), INITIALIZERS
    )


def controlled(unet: layers.Network, controlnet: layers.Network) -> Callable:
    """Joins two networks: `(params, x, noise, cond) -> what the UNet predicts`, for a `Denoiser`.

    Its `params` are {"unet": ..., "controlnet": ...}. Its `cond` is {"text": [B, L, C],
    "control": [B, H, W, 3], "scale": [B]}, see `controlnet`. Both see the same x, label and text.

    Raises:
      ValueError: the networks do not fit each other; lists all differences.
    """
    module = unet.bind(unet.abstract)
    if not isinstance(module, unet_sd.UNet):
        raise ValueError(
            "a ControlNet is for the UNet of Stable Diffusion, unet_sd.UNet; "
            f"this network is a {type(module).__name__}."
        )
    unet_layout = _layout(module)
    layout = _layout(controlnet.bind(controlnet.abstract))
    differences = [
        f"{name} is {layout[name]}, the UNet's is {value}"
        for name, value in unet_layout.items()
        if layout[name] != value
    ]
    if differences:
        raise ValueError(
            f"the ControlNet does not fit the UNet: {'; '.join(differences)}; "
            "use one that was made for such a model."
        )

    def apply(params, x, noise, cond):
        residuals = controlnet.apply(
            params["controlnet"], x, noise, cond["text"], cond["control"], cond["scale"]
        )
        return unet.apply(params["unet"], x, noise, cond["text"], residuals)

    return apply


def control_shape(controlnet: layers.Network, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns [H, W, 3] of the image that goes with latents of `shape`."""
    convolutions = controlnet.bind(controlnet.abstract).controlnet_cond_embedding.blocks
    factor = 2 ** (len(layers.in_order(convolutions)) // 2)
    return shape[0] * factor, shape[1] * factor, 3


def _layout(encoder):
    """Returns the sizes that a ControlNet and its UNet must have in common."""
    blocks = layers.in_order(encoder.down_blocks)
    attention = encoder.mid_block.attentions["0"].transformer_blocks["0"].attn2
    return {
        "in_channels": encoder.conv_in.in_features,
        "block_out_channels": tuple(block.resnets["0"].conv2.out_features for block in blocks),
        "layers_per_block": len(layers.in_order(blocks[0].resnets)),
        "cross_attention_dim": attention.to_k.in_features,
    }
