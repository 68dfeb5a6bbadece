"""Autoencoders between images [B, H, W, 3] in [-1, 1] and latents that are already scaled, float32.

`kl` is that of latent diffusion (Rombach et al., arXiv 2112.10752), diffusers' AutoencoderKL; `tiny` is TAESD
(https://github.com/madebyollin/taesd), diffusers' AutoencoderTiny; `space_to_depth` has no parameters. Attribute names are the keys of
the checkpoints. The modules they make have `encode` and `decode`.
"""

import functools

import jax.numpy as jnp
from flax import nnx

from dmd_jax.models import layers

PADDING = ((0, 1), (0, 1))  # of convolutions that halve the resolution of `kl`
INITIALIZERS = (
    (r"scale$", layers.ones),
    (r"bias$", layers.zeros),
    (r"kernel$", layers.kaiming_uniform),
)


class Attention(nnx.Module):
    """Among the pixels of [B, H, W, C], with one head."""

    def __init__(self, c, *, num_groups, dtype, rngs):
        self.group_norm = layers.GroupNorm(c, num_groups=num_groups, epsilon=1e-6, dtype=dtype)
        self.to_q, self.to_k, self.to_v, out = (
            nnx.Linear(c, c, dtype=dtype, rngs=rngs) for _ in range(4)
        )
        self.to_out = layers.numbered([out])

    def __call__(self, x):
        b, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(b, h * w, 1, c)
        return x + self.to_out["0"](
            layers.attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        ).reshape(x.shape)


class Half(nnx.Module):
    """The encoder or the decoder of `kl`: `down` or up through stages of `widths`, attention at the lowest resolution."""

    def __init__(self, c_in, c_out, widths, *, down, num_layers, num_groups, dtype, rngs, remat):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        norm = dict(num_groups=num_groups, dtype=dtype, rngs=rngs)
        resnet = functools.partial(layers.ResnetBlock, epsilon=1e-6, **norm)
        self.run, self.down = layers.runner(remat), down
        c, stages = widths[0], []
        self.conv_in = conv(c_in, c, dtype=dtype)
        for i, width in enumerate(widths):
            resnets = [resnet(c_in, width) for c_in in (c, *[width] * (num_layers - 1))]
            c, last = width, i == len(widths) - 1
            halve = (
                conv(c, c, strides=2, padding=PADDING, dtype=dtype) if down and not last else None
            )
            double = conv(c, c, dtype=dtype) if not (down or last) else None
            stages.append(layers.stage(resnets, down=halve, up=double))
        setattr(self, "down_blocks" if down else "up_blocks", layers.numbered(stages))
        c_mid = widths[-1 if down else 0]
        self.mid_block = layers.stage(
            [resnet(c_mid, c_mid) for _ in range(2)], [Attention(c_mid, **norm)]
        )
        self.conv_norm_out = layers.GroupNorm(
            c, num_groups=num_groups, epsilon=1e-6, dtype=jnp.float32
        )
        self.conv_out = conv(c, c_out)

    def __call__(self, x):
        x = self.conv_in(x)
        blocks = layers.in_order(self.down_blocks if self.down else self.up_blocks)
        for block in [*blocks, self.mid_block] if self.down else [self.mid_block, *blocks]:
            for resnet, attention in layers.residual_layers(block):
                x = self.run(resnet, x)
                if attention:
                    x = self.run(attention, x)
            if "downsamplers" in block:
                x = block.downsamplers["0"].conv(x)
            if "upsamplers" in block:
                x = block.upsamplers["0"].conv(layers.upsample(x))
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class KL(nnx.Module):
    """See `kl` for the arguments."""

    def __init__(self, *, rngs, widths, num_layers, latent_channels, scaling_factor, **settings):
        self.scaling_factor = scaling_factor
        self.encoder = Half(
            3, 2 * latent_channels, widths, down=True, num_layers=num_layers, rngs=rngs, **settings
        )
        self.decoder = Half(
            latent_channels,
            3,
            widths[::-1],
            down=False,
            num_layers=num_layers + 1,
            rngs=rngs,
            **settings,
        )
        self.quant_conv = nnx.Conv(2 * latent_channels, 2 * latent_channels, (1, 1), rngs=rngs)
        self.post_quant_conv = nnx.Conv(latent_channels, latent_channels, (1, 1), rngs=rngs)

    def encode(self, x):
        """The mean latents of images, scaled."""
        return self.moments(x)[0] * self.scaling_factor

    def moments(self, x):
        """Mean and logarithm of the variance of the latents of images, not scaled."""
        mean, logvar = jnp.split(self.quant_conv(self.encoder(x)), 2, axis=-1)
        return mean, jnp.clip(logvar, -30, 20)

    def decode(self, latents):
        """The images of scaled latents."""
        return self.decoder(self.post_quant_conv(latents / self.scaling_factor))

    __call__ = decode


def kl(
    *,
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
    layers_per_block: int = 2,
    latent_channels: int = 4,
    scaling_factor: float = 0.18215,
    norm_num_groups: int = 32,
    dtype: str = "float32",
    remat: bool | str = False,
) -> layers.Network:
    """The network `(params, latents [B, h, w, latent_channels]) -> images [B, H, W, 3]`, float32; H is h times 2 per level but the last.

    The module also has `encode` and `moments`. The defaults are those of Stable Diffusion 1.x and 2.x.

    Args:
      block_out_channels: channels per level; each level but the last halves the resolution.
      layers_per_block: residual blocks per level in the encoder; the decoder has one more.
      latent_channels: of the latents.
      scaling_factor: what the latents are multiplied by, one over their standard deviation.
      norm_num_groups: of the group normalisations.
      dtype: of the convolutions but the last ones; bfloat16 moves Stable Diffusion's images by 4 %.
      remat: see `layers.runner`; block by block.

    Raises:
      ValueError: the channels do not fit the groups.
    """
    for width in block_out_channels:
        if width % norm_num_groups:
            raise ValueError(
                f"block_out_channels {width} is not divisible by norm_num_groups {norm_num_groups}; change one of them."
            )
    settings = dict(
        widths=tuple(block_out_channels),
        num_layers=layers_per_block,
        latent_channels=latent_channels,
    )
    settings |= dict(
        scaling_factor=scaling_factor,
        num_groups=norm_num_groups,
        dtype=jnp.dtype(dtype),
        remat=remat,
    )
    return layers.functional(lambda rngs: KL(rngs=rngs, **settings), INITIALIZERS)


class TinyBlock(nnx.Module):
    """The residual block of TAESD."""

    def __init__(self, c, *, dtype, rngs):
        self.conv = nnx.Dict(
            {str(i): nnx.Conv(c, c, (3, 3), dtype=dtype, rngs=rngs) for i in (0, 2, 4)}
        )  # a ReLU between each

    def __call__(self, x):
        return nnx.relu(x + self.conv["4"](nnx.relu(self.conv["2"](nnx.relu(self.conv["0"](x))))))


class Tiny(nnx.Module):
    """See `tiny` for the arguments."""

    def __init__(self, *, rngs, width, num_blocks, latent_channels, dtype, remat):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        hidden = functools.partial(conv, width, width, use_bias=False, dtype=dtype)
        self.run = layers.runner(remat)

        def blocks(n):
            return [TinyBlock(width, dtype=dtype, rngs=rngs) for _ in range(n)]

        encoder, decoder = (
            [conv(3, width, dtype=dtype), *blocks(1)],
            [conv(latent_channels, width, dtype=dtype), nnx.relu],
        )
        for _ in range(3):
            encoder += [hidden(strides=2, padding=1), *blocks(num_blocks)]
            decoder += [*blocks(num_blocks), layers.upsample, hidden()]
        self.encoder = nnx.Dict(layers=layers.numbered([*encoder, conv(width, latent_channels)]))
        self.decoder = nnx.Dict(layers=layers.numbered([*decoder, *blocks(1), conv(width, 3)]))

    def encode(self, x):
        """The latents of images."""
        return self._chain(self.encoder, (x + 1) / 2)

    def decode(self, latents):
        """The images of latents."""
        return 2 * self._chain(self.decoder, 3 * jnp.tanh(latents / 3)) - 1

    __call__ = decode

    def _chain(self, half, x):
        *hidden, last = layers.in_order(half.layers)
        for layer in hidden:
            x = self.run(layer, x) if isinstance(layer, TinyBlock) else layer(x)
        return last(x.astype(jnp.float32))


def tiny(
    *,
    width: int = 64,
    num_blocks: int = 3,
    latent_channels: int = 4,
    dtype: str = "float32",
    remat: bool | str = False,
) -> layers.Network:
    """The network `(params, latents [B, h, w, latent_channels]) -> images [B, 8h, 8w, 3]`, float32; the module also has `encode`.

    Latents are those of `kl` with its scaling.

    Args:
      width: channels of every layer.
      num_blocks: residual blocks per resolution, except one at full resolution.
      latent_channels: of the latents.
      dtype: of the convolutions but the last ones.
      remat: see `layers.runner`; block by block.
    """
    settings = dict(
        width=width,
        num_blocks=num_blocks,
        latent_channels=latent_channels,
        dtype=jnp.dtype(dtype),
        remat=remat,
    )
    return layers.functional(lambda rngs: Tiny(rngs=rngs, **settings), INITIALIZERS[1:])


class SpaceToDepth(nnx.Module):
    """See `space_to_depth` for the argument."""

    def __init__(self, factor):
        self.factor = factor

    def encode(self, x):
        """[B, H, W, C] to [B, H / factor, W / factor, factor^2 C]."""
        b, h, w, c = x.shape
        f = self.factor
        if h % f or w % f:
            raise ValueError(
                f"images of {h} x {w} are not divisible by factor {f}; use another factor or size."
            )
        return (
            x.reshape(b, h // f, f, w // f, f, c)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(b, h // f, w // f, f * f * c)
        )

    def decode(self, latents):
        """The inverse of `encode`."""
        b, h, w, c = latents.shape
        f = self.factor
        return (
            latents.reshape(b, h, w, f, f, c // f**2)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(b, h * f, w * f, c // f**2)
        )

    __call__ = decode


def space_to_depth(*, factor: int = 2) -> layers.Network:
    """The network `({}, latents [B, h, w, factor^2 C]) -> images [B, factor h, factor w, C]`: pixels become channels, nothing is lost.

    Args:
      factor: pixels per latent along height and width.
    """
    return layers.functional(lambda rngs: SpaceToDepth(factor), ())
