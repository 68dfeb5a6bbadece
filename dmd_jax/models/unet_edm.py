"""The UNets of EDM's checkpoints.

These are DDPM++ and NCSN++ (Song et al., arXiv 2011.13456) and ADM (Dhariwal and Nichol, arXiv
2105.05233), as in Karras et al., arXiv 2206.00364, Table 7. `ddpmpp`, `ncsnpp` and `adm` make them.

Attribute names are the keys of the checkpoints. The embedding of time and label is float32 whatever
the dtype of the trunk; so are attention logits and norm statistics.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dmd_jax.models import layers

CHOICES = ("ddpmpp", "ncsnpp", "adm")  # what a config may name

SQRT_HALF = 0.5**0.5

# Kinds of layers in the encoder and the decoder.
FIRST = "first"  # the first convolution
BLOCK = "block"  # a `Block`
BLOCK_WITH_SKIP = "block_with_skip"  # a `Block` that also sees a skip connection
ADD_INPUT = "add_input"  # a convolution of the input image, which is added to the features


class Family(NamedTuple):
    """The differences between the three networks; the defaults are DDPM++.

    Attributes:
      down: halves the resolution.
      up: doubles the resolution.
      fourier: whether the noise level is embedded at random frequencies, which are part of the
        checkpoint.
      residual_input: whether the resampled input image is added to the encoder at every level.
      adaptive_scale: whether the embedding scales the features as well as shifting them. If so,
        residual blocks that resample have no convolution around them.
      skip_scale: factor of every residual sum.
      epsilon: of the group normalisations.
      head_width: channels of an attention head; None for one head.
      attention_everywhere: whether every decoder block of an attention resolution has attention;
        otherwise only the last one has it.
    """

    down: Callable = layers.downsample
    up: Callable = layers.upsample
    fourier: bool = False
    residual_input: bool = False
    adaptive_scale: bool = False
    skip_scale: float = SQRT_HALF
    epsilon: float = 1e-6
    head_width: int | None = None
    attention_everywhere: bool = False


def smooth_down(x):
    """Halves the resolution by the filter [1, 3, 3, 1] / 8."""
    return layers.downsample(layers.smooth(x))


def smooth_up(x):
    """Doubles the resolution by the transpose of `smooth_down`, times 4."""
    return layers.smooth(layers.upsample(x))


DDPMPP = Family()
NCSNPP = Family(smooth_down, smooth_up, fourier=True, residual_input=True)
ADM = Family(
    adaptive_scale=True, skip_scale=1.0, epsilon=1e-5, head_width=64, attention_everywhere=True
)

SONG_INITIALIZERS = (
    (r"qkv\.kernel$", layers.xavier_uniform(0.2**0.5)),
    (r"norm\d?\.scale$", layers.ones),
    (r"bias$", layers.zeros),
    (r"(conv1|proj|aux_conv)\.kernel$", layers.xavier_uniform(1e-5)),
    (r"kernel$", layers.xavier_uniform()),
)
NCSNPP_INITIALIZERS = (
    (r"freqs$", layers.normal(16.0)),  # training leaves them as they are, see optim.adamw
    *SONG_INITIALIZERS,
)
ADM_INITIALIZERS = (
    (r"map_label\.kernel$", layers.normal(1.0)),
    (r"norm\d?\.scale$", layers.ones),
    (r"bias$", layers.zeros),  # EDM's are uniform, like the kernels
    (r"(conv1|proj|out_conv)\.kernel$", layers.zeros),
    (r"kernel$", layers.kaiming_uniform),
)
FLOAT_LAYERS = (
    r"^enc/\d+x\d+_(conv|aux_residual)$",  # of the input image
    r"^(dec/\d+x\d+_aux_conv|out_conv)$",  # the last convolution
    r"(^map_\w+|/affine)$",  # the embedding of noise level and label
)


class Block(nnx.Module):
    """Residual block with optional 2x resampling and self-attention.

    It resamples before the first convolution.
    """

    def __init__(self, c_in, c_out, c_emb, *, family, rngs, dtype, resample=None, attention=False):
        conv = functools.partial(nnx.Conv, dtype=dtype, rngs=rngs)
        norm = functools.partial(_group_norm, family=family, dtype=dtype)
        self.family = family
        self.resample = resample
        self.heads = c_out // (family.head_width or c_out) if attention else 0
        self.norm0 = norm(c_in)
        self.conv0 = conv(c_in, c_out, (3, 3))
        self.affine = nnx.Linear(c_emb, c_out * (1 + family.adaptive_scale), rngs=rngs)
        self.norm1 = norm(c_out)
        self.conv1 = conv(c_out, c_out, (3, 3))
        if c_in != c_out or (resample and not family.adaptive_scale):
            self.skip = conv(c_in, c_out, (1, 1))
        if attention:
            self.norm2 = norm(c_out)
            self.qkv = conv(c_out, 3 * c_out, (1, 1))
            self.proj = conv(c_out, c_out, (1, 1))

    def __call__(self, x, emb):
        resample = self.resample or (lambda a: a)
        h = self.conv0(resample(nnx.silu(self.norm0(x))))
        emb = self.affine(emb)[:, None, None].astype(h.dtype)
        h = self.conv1(nnx.silu(self._modulate(h, emb)))
        x = resample(x)
        if hasattr(self, "skip"):
            x = self.skip(x)
        x = (x + h) * self.family.skip_scale
        if self.heads:
            h = self.proj(self._attention(self.qkv(self.norm2(x))))
            x = (x + h) * self.family.skip_scale
        return x

    def _modulate(self, h, emb):
        """Applies the second normalisation, with the embedding."""
        if not self.family.adaptive_scale:
            return self.norm1(h + emb)
        scale, shift = jnp.split(emb, 2, axis=-1)
        return self.norm1(h) * (scale + 1) + shift

    def _attention(self, qkv):
        """Returns attention; q, k and v are interleaved in the channels of `qkv` [B, H, W, 3C]."""
        b, h, w, c3 = qkv.shape
        qkv = qkv.reshape(b, h * w, self.heads, c3 // (3 * self.heads), 3)
        q, k, v = jnp.moveaxis(qkv, -1, 0)  # [B, HW, heads, d]
        k = k / jnp.sqrt(q.shape[-1]).astype(k.dtype)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits).astype(v.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, h, w, c3 // 3)


class Fourier(nnx.Module):
    """Embedding at random frequencies, which training leaves alone."""

    def __init__(self, n):
        self.freqs = nnx.Param(jnp.ones(n))

    def __call__(self, noise):
        return layers.cos_sin(noise, 2 * jnp.pi * jax.lax.stop_gradient(self.freqs[...]))


class UNet(nnx.Module):
    """See `_maker` for the arguments.

    The layers of `enc` and `dec` are listed in the order of their use: `enc_names` and `enc_kinds`,
    `dec_names` and `dec_kinds`.
    """

    def __init__(
        self,
        *,
        family,
        rngs,
        size,
        channels,
        num_classes,
        width,
        multipliers,
        num_blocks,
        attention,
        augment_dim,
        dtype,
        remat,
    ):
        block = functools.partial(Block, c_emb=4 * width, family=family, dtype=dtype, rngs=rngs)
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), dtype=dtype, rngs=rngs)
        linear = functools.partial(nnx.Linear, rngs=rngs)
        self.family = family
        self.size = size
        self.width = width
        self.num_classes = num_classes
        self.run = layers.runner(remat)
        c_noise = width * (1 + family.fourier)
        if family.fourier:
            self.map_noise = Fourier(width)
        if num_classes:
            self.map_label = (
                linear(num_classes, 4 * width, use_bias=False)
                if family.adaptive_scale
                else linear(num_classes, c_noise)
            )
        if augment_dim:
            self.map_augment = linear(augment_dim, c_noise, use_bias=False)
        self.map_layer0 = linear(c_noise, 4 * width)
        self.map_layer1 = linear(4 * width, 4 * width)

        enc = [(f"{size}x{size}_conv", FIRST, conv(channels, width))]
        c = width
        c_input = channels
        skips = [c]
        for level, multiplier in enumerate(multipliers):
            res = size >> level
            if level > 0:
                enc.append((f"{res}x{res}_down", BLOCK, block(c, c, resample=family.down)))
                skips.append(c)
                if family.residual_input:
                    aux_residual = conv(c_input, c, padding=2)
                    enc.append((f"{res}x{res}_aux_residual", ADD_INPUT, aux_residual))
                    c_input = c
            for i in range(num_blocks):
                c_out = multiplier * width
                layer = block(c, c_out, attention=res in attention)
                enc.append((f"{res}x{res}_block{i}", BLOCK, layer))
                c = c_out
                skips.append(c)

        bottom = size >> (len(multipliers) - 1)
        dec = [
            (f"{bottom}x{bottom}_in0", BLOCK, block(c, c, attention=True)),
            (f"{bottom}x{bottom}_in1", BLOCK, block(c, c)),
        ]
        for level, multiplier in reversed(list(enumerate(multipliers))):
            res = size >> level
            if res > bottom:
                dec.append((f"{res}x{res}_up", BLOCK, block(c, c, resample=family.up)))
            for i in range(num_blocks + 1):
                c_out = multiplier * width
                attend = res in attention and (i == num_blocks or family.attention_everywhere)
                layer = block(c + skips.pop(), c_out, attention=attend)
                dec.append((f"{res}x{res}_block{i}", BLOCK_WITH_SKIP, layer))
                c = c_out

        self.enc_names, self.enc_kinds, enc_layers = zip(*enc, strict=True)
        self.dec_names, self.dec_kinds, dec_layers = zip(*dec, strict=True)
        enc_dict = dict(zip(self.enc_names, enc_layers, strict=True))
        dec_dict = dict(zip(self.dec_names, dec_layers, strict=True))
        out_norm = _group_norm(c, family=family, dtype=dtype)
        out_conv = conv(c, channels)
        if family.adaptive_scale:
            self.out_norm = out_norm
            self.out_conv = out_conv
        else:
            dec_dict[f"{size}x{size}_aux_norm"] = out_norm
            dec_dict[f"{size}x{size}_aux_conv"] = out_conv
        self.enc = nnx.Dict(enc_dict)
        self.dec = nnx.Dict(dec_dict)

    def __call__(self, x, noise, label=None, augment=None):
        emb = self.embed(noise, label, augment)
        x, skips = self.encode(x, emb)
        for name, kind in zip(self.dec_names, self.dec_kinds, strict=True):
            if kind == BLOCK_WITH_SKIP:
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = self.run(self.dec[name], x, emb)
        if self.family.adaptive_scale:
            return self.out_conv(nnx.silu(self.out_norm(x)))
        top = f"{self.size}x{self.size}"
        return self.dec[f"{top}_aux_conv"](nnx.silu(self.dec[f"{top}_aux_norm"](x)))

    def embed(self, noise, label=None, augment=None):
        """Returns the embedding that every block sees, [B, 4 width].

        Args:
          noise: noise levels, [B].
          label: labels, [B], or None.
          augment: augmentations, [B, augment_dim], or None.
        """
        n = self.num_classes
        label = (
            jnp.zeros((len(noise), n), jnp.float32)
            if label is None
            else jax.nn.one_hot(label, n, dtype=jnp.float32)
        )
        augment = 0 if augment is None else self.map_augment(augment)
        if self.family.adaptive_scale:
            emb = layers.cos_sin(
                noise, layers.positional_frequencies(self.width // 2, endpoint=False)
            )
            emb = self.map_layer1(nnx.silu(self.map_layer0(emb + augment)))
            return nnx.silu(emb + self.map_label(label) if n else emb)
        if self.family.fourier:
            emb = self.map_noise(noise)
        else:
            emb = layers.cos_sin(
                noise, layers.positional_frequencies(self.width // 2, endpoint=True)
            )
        emb = jnp.roll(emb, emb.shape[-1] // 2, axis=-1) + augment  # sine before cosine
        if n:
            emb += self.map_label(label * n**0.5)
        return nnx.silu(self.map_layer1(nnx.silu(self.map_layer0(emb))))

    def encode(self, x, emb):
        """Returns the features at the lowest resolution, [B, h, w, C], and the skips."""
        skips = []
        image = x
        for name, kind in zip(self.enc_names, self.enc_kinds, strict=True):
            layer = self.enc[name]
            if kind == FIRST:
                x = layer(x)
            elif kind == ADD_INPUT:
                skips.pop()  # replaced by the sum
                image = layers.downsample(layers.smooth(layer(image), padding=0))
                x = (x + image) * SQRT_HALF
                image = x
            else:
                x = self.run(layer, x, emb)
            skips.append(x)
        return x, skips


def _group_norm(channels, *, family, dtype):
    return layers.GroupNorm(
        channels, num_groups=min(32, channels // 4), epsilon=family.epsilon, dtype=dtype
    )


def _maker(family, initializers, *, width, multipliers, num_blocks, attention):
    """Returns the function that makes networks of a family, with these defaults."""

    def make(
        *,
        size: int,
        channels: int,
        num_classes: int = 0,
        width: int = width,
        multipliers: tuple[int, ...] = multipliers,
        num_blocks: int = num_blocks,
        attention: tuple[int, ...] = attention,
        augment_dim: int = 0,
        dtype: str = "float32",
        remat: bool | str = False,
    ) -> layers.Network:
        """Returns the network of a UNet:

        `(params, x [B, size, size, channels], noise [B], label [B] or None)
        -> [B, size, size, channels]`.

        Args:
          size: height and width of the images, divisible by 2 at every level but the last.
          channels: of the images.
          num_classes: labels are integers below it; `num_classes` itself, like None, is no label.
          width: channels of the first layer.
          multipliers: of the width, one per level; each level halves the resolution.
          num_blocks: residual blocks per level in the encoder; the decoder has one more.
          attention: resolutions with self-attention; ADM's channels are multiples of 64 there.
          augment_dim: length of the augmentation vector of EDM's own training, 9 in its
            checkpoints; this package never passes one.
          dtype: of the convolutions.
          remat: see `layers.runner`; block by block.

        Raises:
          ValueError: the size cannot be halved that often, or there is no such remat policy.
        """
        if size % 2 ** (len(multipliers) - 1):
            raise ValueError(
                f"size {size} cannot be halved {len(multipliers) - 1} times; "
                "use fewer multipliers or another size."
            )
        settings = dict(
            size=size,
            channels=channels,
            num_classes=num_classes,
            width=width,
            multipliers=multipliers,
        )
        settings |= dict(
            num_blocks=num_blocks,
            attention=attention,
            augment_dim=augment_dim,
            dtype=jnp.dtype(dtype),
            remat=remat,
        )
        rules = initializers
        if not num_classes:
            rules = tuple(rule for rule in initializers if "map_label" not in rule[0])
        return layers.functional(
            lambda rngs: UNet(family=family, rngs=rngs, **settings), rules, FLOAT_LAYERS
        )

    return make


# The defaults are those of the checkpoints of CIFAR-10 ("vp" and "ve") and ImageNet-64. FFHQ and
# AFHQv2 have size 64 and multipliers (1, 2, 2, 2).
ddpmpp = _maker(
    DDPMPP, SONG_INITIALIZERS, width=128, multipliers=(2, 2, 2), num_blocks=4, attention=(16,)
)
ncsnpp = _maker(
    NCSNPP, NCSNPP_INITIALIZERS, width=128, multipliers=(2, 2, 2), num_blocks=4, attention=(16,)
)
adm = _maker(
    ADM, ADM_INITIALIZERS, width=192, multipliers=(1, 2, 3, 4), num_blocks=3, attention=(32, 16, 8)
)
