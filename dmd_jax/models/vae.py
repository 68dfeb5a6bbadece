"""Autoencoders between images [B, H, W, 3] in [-1, 1] and latents that are already scaled, float32.

`kl` is that of latent diffusion (Rombach et al., arXiv 2112.10752), diffusers' AutoencoderKL;
`tiny` is TAESD (https://github.com/madebyollin/taesd), diffusers' AutoencoderTiny;
`space_to_depth` has no parameters. Attribute names are the keys of the checkpoints. The modules
have `encode` and `decode`.
"""

import functools

import jax.numpy as jnp
from flax import nnx

from dmd_jax.models import layers

CHOICES = ("kl", "tiny", "space_to_depth")  # what a config may name

PADDING = ((0, 1), (0, 1))  # of convolutions that halve the resolution in `kl`
INITIALIZERS = (
    (r"scale$", layers.ones),
    (r"bias$", layers.zeros),
    (r"kernel$", layers.kaiming_uniform),
)


class Attention(nnx.Module):
    """Attention among the pixels of [B, H, W, C], with one head."""

    def __init__(self, c, *, num_groups, dtype, rngs):
        self.group_norm = layers.GroupNorm(c, num_groups=num_groups, epsilon=1e-6, dtype=dtype)
        self.to_q, self.to_k, self.to_v, out = (
            nnx.Linear(c, c, dtype=dtype, rngs=rngs) for _ in range(4)
        )
        self.to_out = layers.numbered([out])

    def __call__(self, x):
        b, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(b, h * w, 1, c)
        tokens = layers.attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out["0"](tokens).reshape(x.shape)


class Encoder(nnx.Module):
    """The encoder of `kl`: stages of `widths`, and attention at the lowest resolution."""

    def __init__(self, c_out, widths, *, num_layers, num_groups, dtype, remat, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        norm = dict(num_groups=num_groups, dtype=dtype, rngs=rngs)
        self.run = layers.runner(remat)
        self.conv_in = conv(3, widths[0], dtype=dtype)
        stages = []
        c_in = widths[0]
        for c in widths:
            halve = None
            if len(stages) < len(widths) - 1:
                halve = conv(c, c, strides=2, padding=PADDING, dtype=dtype)
            stages.append(layers.stage(_resnets(c_in, c, num_layers, norm), down=halve))
            c_in = c
        self.down_blocks = layers.numbered(stages)
        self.mid_block = _mid_block(widths[-1], norm)
        self.conv_norm_out = _norm_out(widths[-1], num_groups)
        self.conv_out = conv(widths[-1], c_out)

    def __call__(self, x):
        x = self.conv_in(x)
        for block in layers.in_order(self.down_blocks):
            x = _run_stage(self.run, block, x)
            if "downsamplers" in block:
                x = block.downsamplers["0"].conv(x)
        x = _run_stage(self.run, self.mid_block, x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """The decoder of `kl`: attention at the lowest resolution, and stages of `widths`."""

    def __init__(self, c_in, widths, *, num_layers, num_groups, dtype, remat, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        norm = dict(num_groups=num_groups, dtype=dtype, rngs=rngs)
        self.run = layers.runner(remat)
        self.conv_in = conv(c_in, widths[0], dtype=dtype)
        self.mid_block = _mid_block(widths[0], norm)
        stages = []
        c_in = widths[0]
        for c in widths:
            double = None
            if len(stages) < len(widths) - 1:
                double = conv(c, c, dtype=dtype)
            stages.append(layers.stage(_resnets(c_in, c, num_layers, norm), up=double))
            c_in = c
        self.up_blocks = layers.numbered(stages)
        self.conv_norm_out = _norm_out(widths[-1], num_groups)
        self.conv_out = conv(widths[-1], 3)

    def __call__(self, x):
        x = _run_stage(self.run, self.mid_block, self.conv_in(x))
        for block in layers.in_order(self.up_blocks):
            x = _run_stage(self.run, block, x)
            if "upsamplers" in block:
                x = block.upsamplers["0"].conv(layers.upsample(x))
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


def _resnets(c_in, c_out, n, norm):
    widths_in = [c_in, *[c_out] * (n - 1)]
    return [layers.ResnetBlock(c, c_out, epsilon=1e-6, **norm) for c in widths_in]


def _mid_block(c, norm):
    return layers.stage(_resnets(c, c, 2, norm), [Attention(c, **norm)])


def _norm_out(c, num_groups):
    return layers.GroupNorm(c, num_groups=num_groups, epsilon=1e-6, dtype=jnp.float32)


def _run_stage(run, block, x):
    for resnet, attention in layers.residual_layers(block):
        x = run(resnet, x)
        if attention:
            x = run(attention, x)
    return x


class KL(nnx.Module):
    """See `kl` for the arguments."""

    def __init__(
        self,
        *,
        widths,
        num_layers,
        latent_channels,
        scaling_factor,
        num_groups,
        dtype,
        remat,
        rngs,
    ):
        shared = dict(num_groups=num_groups, dtype=dtype, remat=remat, rngs=rngs)
        c_moments = 2 * latent_channels
        self.scaling_factor = scaling_factor
        self.encoder = Encoder(c_moments, widths, num_layers=num_layers, **shared)
        self.decoder = Decoder(latent_channels, widths[::-1], num_layers=num_layers + 1, **shared)
        self.quant_conv = nnx.Conv(c_moments, c_moments, (1, 1), rngs=rngs)
        self.post_quant_conv = nnx.Conv(latent_channels, latent_channels, (1, 1), rngs=rngs)

    def encode(self, x):
        """Returns the mean latents of images, scaled."""
        return self.moments(x)[0] * self.scaling_factor

    def moments(self, x):
        """Returns mean and logarithm of the variance of the latents of images, not scaled."""
        mean, logvar = jnp.split(self.quant_conv(self.encoder(x)), 2, axis=-1)
        return mean, jnp.clip(logvar, -30, 20)

    def decode(self, latents):
        """Returns the images of scaled latents."""
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
    """Returns the network `(params, latents [B, h, w, latent_channels]) -> images [B, H, W, 3]`.

    Images are float32; each level but the last doubles their height and width. The module also has
    `encode` and `moments`. The defaults are those of Stable Diffusion 1.x and 2.x.

    Args:
      block_out_channels: channels per level; each level but the last halves the resolution.
      layers_per_block: residual blocks per level in the encoder; the decoder has one more.
      latent_channels: of the latents.
      scaling_factor: factor of the latents, one over their standard deviation.
      norm_num_groups: of the group normalisations.
      dtype: of the convolutions but the last ones; bfloat16 moves Stable Diffusion's images by 4 %.
      remat: see `layers.runner`; block by block.

    Raises:
      ValueError: the channels do not fit the groups.
    """
    for width in block_out_channels:
        if width % norm_num_groups:
            raise ValueError(
                f"block_out_channels {width} is not divisible by norm_num_groups "
                f"{norm_num_groups}; change one of them."
            )
    settings = dict(
        widths=tuple(block_out_channels),
        num_layers=layers_per_block,
        latent_channels=latent_channels,
        scaling_factor=scaling_factor,
        num_groups=norm_num_groups,
        dtype=jnp.dtype(dtype),
        remat=remat,
    )
    return layers.functional(lambda rngs: KL(rngs=rngs, **settings), INITIALIZERS)


class TinyBlock(nnx.Module):
    """The residual block of TAESD."""

    def __init__(self, c, *, dtype, rngs):
        # What the checkpoints number 1 and 3 are ReLUs.
        self.conv = nnx.Dict(
            {str(i): nnx.Conv(c, c, (3, 3), dtype=dtype, rngs=rngs) for i in (0, 2, 4)}
        )

    def __call__(self, x):
        h = nnx.relu(self.conv["0"](x))
        h = nnx.relu(self.conv["2"](h))
        return nnx.relu(x + self.conv["4"](h))


class Tiny(nnx.Module):
    """See `tiny` for the arguments."""

    def __init__(self, *, rngs, width, num_blocks, latent_channels, dtype, remat):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        hidden = functools.partial(conv, width, width, use_bias=False, dtype=dtype)
        self.run = layers.runner(remat)

        def blocks(n):
            return [TinyBlock(width, dtype=dtype, rngs=rngs) for _ in range(n)]

        encoder = [conv(3, width, dtype=dtype), *blocks(1)]
        decoder = [conv(latent_channels, width, dtype=dtype), nnx.relu]
        for _ in range(3):
            encoder += [hidden(strides=2, padding=1), *blocks(num_blocks)]
            decoder += [*blocks(num_blocks), layers.upsample, hidden()]
        self.encoder = nnx.Dict(layers=layers.numbered([*encoder, conv(width, latent_channels)]))
        self.decoder = nnx.Dict(layers=layers.numbered([*decoder, *blocks(1), conv(width, 3)]))

    def encode(self, x):
        """Returns the latents of images."""
        return self._chain(self.encoder, (x + 1) / 2)

    def decode(self, latents):
        """Returns the images of latents."""
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
    """Returns the network `(params, latents [B, h, w, latent_channels]) -> images [B, 8h, 8w, 3]`.

    Images are float32, and latents are those of `kl` with its scaling. The module also has
    `encode`.

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
        """Returns latents [B, H / factor, W / factor, factor^2 C] of images [B, H, W, C]."""
        b, h, w, c = x.shape
        f = self.factor
        if h % f or w % f:
            raise ValueError(
                f"images of {h} x {w} are not divisible by factor {f}; use another factor or size."
            )
        x = x.reshape(b, h // f, f, w // f, f, c).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, h // f, w // f, f * f * c)

    def decode(self, latents):
        """Inverts `encode`."""
        b, h, w, c = latents.shape
        f = self.factor
        x = latents.reshape(b, h, w, f, f, c // f**2).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, h * f, w * f, c // f**2)

    __call__ = decode


def space_to_depth(*, factor: int = 2) -> layers.Network:
    """Returns the network `({}, latents [B, h, w, factor^2 C]) -> images`.

    Images are [B, factor h, factor w, C]. Pixels become channels, and nothing is lost.

    Args:
      factor: pixels per latent along height and width.
    """
    return layers.functional(lambda rngs: SpaceToDepth(factor), ())
