"""DDPM++, the UNet of EDM's CIFAR-10, FFHQ and AFHQv2 "vp" checkpoints (Song et al., arXiv 2011.13456; Karras et al., arXiv 2206.00364).

Attribute names are the keys of those checkpoints. The time and label embedding is float32 whatever the dtype of the trunk.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dmd_jax.models import layers

SQRT_HALF = 0.5**0.5

INITIALIZERS = (
    (r"norm\d?\.scale$", layers.ones),
    (r"bias$", layers.zeros),
    (r"(conv1|proj|aux_conv)\.kernel$", layers.xavier_uniform(1e-5)),
    (r"kernel$", layers.xavier_uniform()),
)
ATTENTION_INITIALIZERS = ((r"qkv\.kernel$", layers.xavier_uniform(0.2**0.5)), *INITIALIZERS)


class Block(nnx.Module):
    """Residual block with optional 2x resampling, before the first convolution, and self-attention."""

    def __init__(self, c_in, c_out, c_emb, *, rngs, dtype, resample=None, heads=0):
        conv = functools.partial(nnx.Conv, dtype=dtype, rngs=rngs)
        norm = functools.partial(_group_norm, dtype=dtype)
        self.resample = resample
        self.heads = heads
        self.norm0 = norm(c_in)
        self.conv0 = conv(c_in, c_out, (3, 3))
        self.affine = nnx.Linear(c_emb, c_out, rngs=rngs)
        self.norm1 = norm(c_out)
        self.conv1 = conv(c_out, c_out, (3, 3))
        if c_in != c_out or resample:
            self.skip = conv(c_in, c_out, (1, 1))
        if heads:
            self.norm2 = norm(c_out)
            self.qkv = conv(c_out, 3 * c_out, (1, 1))
            self.proj = conv(c_out, c_out, (1, 1))

    def __call__(self, x, emb):
        resample = self.resample or (lambda a: a)
        h = self.conv0(resample(nnx.silu(self.norm0(x))))
        h = h + self.affine(emb)[:, None, None].astype(h.dtype)
        h = self.conv1(nnx.silu(self.norm1(h)))
        if hasattr(self, "skip"):
            x = self.skip(resample(x))
        x = (x + h) * SQRT_HALF
        if self.heads:
            x = (x + self.proj(self._attention(self.qkv(self.norm2(x))))) * SQRT_HALF
        return x

    def _attention(self, qkv):
        """Softmax attention; q, k and v are interleaved in the channels of `qkv` [B, H, W, 3C]."""
        b, h, w, c3 = qkv.shape
        q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, self.heads, c3 // (3 * self.heads), 3), -1, 0)  # [B, HW, heads, d]
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k / jnp.sqrt(q.shape[-1]).astype(k.dtype), preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits).astype(v.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, h, w, c3 // 3)


class UNet(nnx.Module):
    """See `make` for the arguments."""

    def __init__(self, *, rngs, size, channels, num_classes, width, multipliers, num_blocks, attention, dtype, remat):
        block = functools.partial(Block, c_emb=4 * width, dtype=dtype, rngs=rngs)
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), dtype=dtype, rngs=rngs)
        self.width, self.num_classes, self.remat = width, num_classes, remat
        if num_classes:
            self.map_label = nnx.Linear(num_classes, width, rngs=rngs)
        self.map_layer0 = nnx.Linear(width, 4 * width, rngs=rngs)
        self.map_layer1 = nnx.Linear(4 * width, 4 * width, rngs=rngs)

        enc, dec, skips, c = {}, {}, [], channels
        for level, multiplier in enumerate(multipliers):
            res = size >> level
            if level == 0:
                enc[f"{res}x{res}_conv"], c = conv(c, width), width
            else:
                enc[f"{res}x{res}_down"] = block(c, c, resample=layers.downsample)
            skips.append(c)
            for i in range(num_blocks):
                enc[f"{res}x{res}_block{i}"] = block(c, multiplier * width, heads=int(res in attention))
                c = multiplier * width
                skips.append(c)
        for level, multiplier in reversed(list(enumerate(multipliers))):
            res = size >> level
            if level == len(multipliers) - 1:
                dec[f"{res}x{res}_in0"] = block(c, c, heads=1)
                dec[f"{res}x{res}_in1"] = block(c, c)
            else:
                dec[f"{res}x{res}_up"] = block(c, c, resample=layers.upsample)
            for i in range(num_blocks + 1):
                heads = int(i == num_blocks and res in attention)
                dec[f"{res}x{res}_block{i}"] = block(c + skips.pop(), multiplier * width, heads=heads)
                c = multiplier * width
        dec[f"{size}x{size}_aux_norm"] = _group_norm(c, dtype=dtype)
        dec[f"{size}x{size}_aux_conv"] = conv(c, channels)
        self.enc_names, self.dec_names = tuple(enc), tuple(dec)
        self.enc, self.dec = nnx.Dict(enc), nnx.Dict(dec)

    def __call__(self, x, noise, label=None):
        run = nnx.remat(_run) if self.remat else _run
        emb = layers.positional_embedding(noise, self.width)
        if self.num_classes and label is not None:
            emb += self.map_label(jax.nn.one_hot(label, self.num_classes) * self.num_classes**0.5)
        emb = nnx.silu(self.map_layer1(nnx.silu(self.map_layer0(emb))))

        skips = []
        for name in self.enc_names:
            x = self.enc[name](x) if name.endswith("_conv") else run(self.enc[name], x, emb)
            skips.append(x)
        *blocks, aux_norm, aux_conv = self.dec_names
        for name in blocks:
            if "block" in name:
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = run(self.dec[name], x, emb)
        return self.dec[aux_conv](nnx.silu(self.dec[aux_norm](x)))


def _run(block, x, emb):
    return block(x, emb)


def _group_norm(channels, *, dtype):
    return layers.GroupNorm(channels, num_groups=min(32, channels // 4), epsilon=1e-6, dtype=dtype)


def make(
    *,
    size: int,
    channels: int,
    num_classes: int = 0,
    width: int = 128,
    multipliers: tuple[int, ...] = (2, 2, 2),
    num_blocks: int = 4,
    attention: tuple[int, ...] = (16,),
    dtype: str = "float32",
    remat: bool = False,
) -> layers.Network:
    """The network `(params, x [B, size, size, channels], noise [B], label [B] or None) -> [B, size, size, channels]`.

    Args:
      size: height and width of the images, divisible by 2 at every level but the last.
      channels: of the images.
      num_classes: labels are integers below it; `num_classes` itself, like None, means no label.
      width: channels of the first layer.
      multipliers: of the width, one per level; each level halves the resolution.
      num_blocks: residual blocks per level in the encoder; the decoder has one more.
      attention: resolutions with self-attention.
      dtype: of the convolutions.
      remat: recompute activations in the backward pass instead of storing them, block by block.
    """
    if size % 2 ** (len(multipliers) - 1):
        raise ValueError(f"size {size} cannot be halved {len(multipliers) - 1} times; use fewer multipliers or another size.")
    settings = dict(size=size, channels=channels, num_classes=num_classes, width=width, multipliers=multipliers)
    settings |= dict(num_blocks=num_blocks, attention=attention, dtype=jnp.dtype(dtype), remat=remat)
    return layers.functional(lambda rngs: UNet(rngs=rngs, **settings), ATTENTION_INITIALIZERS)
