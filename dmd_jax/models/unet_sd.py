"""The UNet of Stable Diffusion 1.x and 2.x (Rombach et al., arXiv 2112.10752), diffusers' UNet2DConditionModel, and stacks of it.

Attribute names are the keys of the checkpoints. The time embedding is float32 whatever the dtype of the trunk; so are the softmax of
attentions, the statistics of norms and the last convolution.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from dmd_jax.models import layers

PADDING = 1  # of convolutions that halve the resolution; the autoencoder's differs
INITIALIZERS = (
    (r"scale$", layers.ones),
    (r"bias$", layers.zeros),
    (r"(conv2|proj_out|conv_out)\.kernel$", layers.zeros),
    (r"kernel$", layers.kaiming_uniform),
)


class Attention(nnx.Module):
    """Of [B, L, C] over [B, M, c_context]."""

    def __init__(self, c, c_context, heads, *, dtype, rngs):
        linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.heads = heads
        self.to_q = linear(c, c, use_bias=False)
        self.to_k, self.to_v = (linear(c_context, c, use_bias=False) for _ in range(2))
        self.to_out = layers.numbered([linear(c, c)])

    def __call__(self, x, context):
        q, k, v = (
            a.reshape(*a.shape[:2], self.heads, -1)
            for a in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out["0"](layers.attention(q, k, v).reshape(x.shape))


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention and a gated feed-forward layer on [B, L, C]."""

    def __init__(self, c, heads, *, c_cond, dtype, rngs):
        norm = functools.partial(layers.layer_norm, c, dtype=dtype, rngs=rngs)
        linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.norm1, self.attn1 = norm(), Attention(c, c, heads, dtype=dtype, rngs=rngs)
        self.norm2, self.attn2 = norm(), Attention(c, c_cond, heads, dtype=dtype, rngs=rngs)
        self.norm3, self.ff = (
            norm(),
            nnx.Dict(net=nnx.Dict({"0": nnx.Dict(proj=linear(c, 8 * c)), "2": linear(4 * c, c)})),
        )

    def __call__(self, x, cond):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), cond)
        value, gate = jnp.split(self.ff.net["0"].proj(self.norm3(x)), 2, axis=-1)
        return x + self.ff.net["2"](value * layers.gelu(gate))


class Transformer(nnx.Module):
    """A transformer block on the pixels of [B, H, W, C], with cond [B, L, c_cond]."""

    def __init__(self, c, heads, *, c_cond, linear, num_groups, dtype, rngs):
        project = nnx.Linear if linear else functools.partial(nnx.Conv, kernel_size=(1, 1))
        self.norm = layers.GroupNorm(c, num_groups=num_groups, epsilon=1e-6, dtype=dtype)
        self.proj_in, self.proj_out = (project(c, c, dtype=dtype, rngs=rngs) for _ in range(2))
        self.transformer_blocks = layers.numbered(
            [TransformerBlock(c, heads, c_cond=c_cond, dtype=dtype, rngs=rngs)]
        )

    def __call__(self, x, cond):
        b, h, w, c = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        return x + self.proj_out(self.transformer_blocks["0"](tokens, cond).reshape(b, h, w, c))


class Encoder(nnx.Module):
    """The half of a UNet that halves the resolution, and the middle: what a ControlNet has too. See `unet` for the settings."""

    def __init__(
        self,
        *,
        rngs,
        channels,
        widths,
        layers_per_block,
        attention,
        heads,
        c_cond,
        linear,
        num_groups,
        dtype,
        remat,
    ):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), dtype=dtype, rngs=rngs)
        resnet, transformers = _blocks(widths, heads, c_cond, linear, num_groups, dtype, rngs)
        self.run = layers.runner(remat)
        c = widths[0]
        self.time_embedding = nnx.Dict(
            linear_1=nnx.Linear(c, 4 * c, rngs=rngs), linear_2=nnx.Linear(4 * c, 4 * c, rngs=rngs)
        )
        self.conv_in = conv(channels, c)
        down = []
        for level, width in enumerate(widths):
            resnets = [resnet(c_in, width) for c_in in (c, *[width] * (layers_per_block - 1))]
            c, last = width, level == len(widths) - 1
            halve = None if last else conv(c, c, strides=2, padding=PADDING)
            down.append(
                layers.stage(
                    resnets, transformers(level, layers_per_block * attention[level]), down=halve
                )
            )
        self.down_blocks = layers.numbered(down)
        self.mid_block = layers.stage([resnet(c, c), resnet(c, c)], transformers(-1, 1))

    def embed(self, noise):
        """The embedding of labels [B] that every residual block sees, [B, 4 widths[0]]."""
        emb = layers.cos_sin(
            noise,
            layers.positional_frequencies(
                self.time_embedding.linear_1.in_features // 2, endpoint=False
            ),
        )
        return self.time_embedding.linear_2(nnx.silu(self.time_embedding.linear_1(emb)))

    def encode(self, x, emb, cond):
        """From features of `conv_in`: the features after the middle, and the skips, of which the last is the first to be used."""
        skips = [x]
        for block in layers.in_order(self.down_blocks):
            for resnet, transformer in layers.residual_layers(block):
                x = self._layer(resnet, transformer, x, emb, cond)
                skips.append(x)
            if "downsamplers" in block:
                x = block.downsamplers["0"].conv(x)
                skips.append(x)
        for resnet, transformer in layers.residual_layers(self.mid_block):
            x = self._layer(resnet, transformer, x, emb, cond)
        return x, skips

    def _layer(self, resnet, transformer, x, emb, cond):
        x = self.run(resnet, x, emb)
        return self.run(transformer, x, cond) if transformer else x


class UNet(Encoder):
    """See `unet` for the settings."""

    def __init__(self, **settings):
        super().__init__(**settings)
        names = ("widths", "heads", "c_cond", "linear", "num_groups", "dtype", "rngs")
        channels, widths, layers_per_block, attention, rngs, dtype = (
            settings[name]
            for name in ("channels", "widths", "layers_per_block", "attention", "rngs", "dtype")
        )
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        resnet, transformers = _blocks(*(settings[name] for name in names))
        c, skips, up = widths[-1], skip_channels(widths, layers_per_block), []
        for level, width in reversed(list(enumerate(widths))):
            resnets = [
                resnet(c_in + skips.pop(), width) for c_in in (c, *[width] * layers_per_block)
            ]
            c = width
            attentions = transformers(level, (layers_per_block + 1) * attention[level])
            up.append(
                layers.stage(resnets, attentions, up=conv(c, c, dtype=dtype) if level else None)
            )
        self.up_blocks = layers.numbered(up)
        self.conv_norm_out = layers.GroupNorm(
            c, num_groups=settings["num_groups"], epsilon=1e-5, dtype=jnp.float32
        )
        self.conv_out = conv(c, channels)

    def __call__(self, x, noise, cond, residuals=None):
        return self.head(self.trunk(self.conv_in(x), noise, cond, residuals))

    def trunk(self, x, noise, cond, residuals=None):
        """From features of `conv_in` to those of `head`; `residuals` (of the middle, of each skip) are added to what the decoder sees."""
        emb = self.embed(noise)
        x, skips = self.encode(x, emb, cond)
        if residuals is not None:
            x, skips = jax.tree.map(jnp.add, (x, skips), residuals)
        for block in layers.in_order(self.up_blocks):
            for resnet, transformer in layers.residual_layers(block):
                x = self._layer(
                    resnet, transformer, jnp.concatenate([x, skips.pop()], axis=-1), emb, cond
                )
            if "upsamplers" in block:
                _, h, w, _ = skips[-1].shape
                x = block.upsamplers["0"].conv(layers.upsample(x)[:, :h, :w])
        return x

    def head(self, x):
        """From features to what the network predicts, float32."""
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Stack(nnx.Module):
    """UNets in series, the features of each going into the next: of `conv_in` and of `conv_norm_out` and `conv_out` there is one each."""

    def __init__(self, n, **settings):
        units = [UNet(**settings) for _ in range(n)]
        for unit in units[:-1]:
            del unit.conv_norm_out, unit.conv_out
        for unit in units[1:]:
            del unit.conv_in
        self.units = layers.numbered(units)

    def __call__(self, x, noise, cond):
        units = layers.in_order(self.units)
        x = units[0].conv_in(x)
        for unit in units:
            x = unit.trunk(x, noise, cond)
        return units[-1].head(x)


def _grow(abstract, params):
    """Parameters of a stack out of those of one UNet, in each unit but for what it lacks; the units share arrays."""
    units = abstract["units"]
    one = units["0"] | units[str(len(units) - 1)]
    expected, found = (traverse_util.flatten_dict(tree, sep=".") for tree in (one, params))
    problems = [f"missing {path}" for path in expected if path not in found] + [
        f"unused {path}" for path in found if path not in expected
    ]
    pairs = {path: (found[path].shape, a.shape) for path, a in expected.items() if path in found}
    problems += [f"{path} has shape {a}, expected {b}" for path, (a, b) in pairs.items() if a != b]
    if problems:
        raise ValueError(
            f"a stack of UNets grows from the parameters of one with the same settings; these differ: {'; '.join(problems)}."
        )
    return {
        "units": {name: {child: params[child] for child in unit} for name, unit in units.items()}
    }


def skip_channels(widths: tuple[int, ...], layers_per_block: int) -> list[int]:
    """Of each skip of an `Encoder`, in the order of `Encoder.encode`."""
    halved = [[width] * (layers_per_block + 1) for width in widths]
    return [widths[0], *itertools.chain(*halved)][:-1]  # the last level is not halved


def _blocks(widths, heads, c_cond, linear, num_groups, dtype, rngs):
    """What makes the residual blocks of a UNet, and the transformers of a level."""
    norm = dict(num_groups=num_groups, dtype=dtype, rngs=rngs)
    resnet = functools.partial(layers.ResnetBlock, c_emb=4 * widths[0], epsilon=1e-5, **norm)
    return resnet, lambda level, n: [
        Transformer(widths[level], heads[level], c_cond=c_cond, linear=linear, **norm)
        for _ in range(n)
    ]


def unet(
    *,
    size: int = 64,
    channels: int = 4,
    num_classes: int = 0,
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
    layers_per_block: int = 2,
    attention: tuple[bool, ...] = (True, True, True, False),
    num_heads: int | tuple[int, ...] = 8,
    cross_attention_dim: int = 768,
    use_linear_projection: bool = False,
    norm_num_groups: int = 32,
    stack: int = 1,
    dtype: str = "float32",
    remat: bool | str = False,
) -> layers.Network:
    """The network `(params, x [B, H, W, channels], noise [B], cond [B, L, cross_attention_dim]) -> [B, H, W, channels]`, float32.

    The defaults are those of Stable Diffusion 1.x. 2.x: num_heads (5, 10, 20, 20), cross_attention_dim 1024, use_linear_projection. Any
    height and width will do.

    With `stack` = 2 it is the "Stacked U-Net" of InstaFlow-1.7B (Liu et al., arXiv 2309.06380): two UNets in series with weights of their
    own, the same label and text for each, and the blocks between them left out that only turn features into latents and back. Which
    those are is an interpretation, since no code or checkpoint of it is public: the first one's conv_norm_out and conv_out and the
    second one's conv_in, which leaves 1,719,017,924 parameters.

    Args:
      size: usual height and width, which the network does not depend on.
      channels: of the latents.
      num_classes: 0, since the condition is a sequence.
      block_out_channels: channels per level; each level halves the resolution.
      layers_per_block: residual blocks per level in the encoder; the decoder has one more.
      attention: per level, whether a transformer follows each residual block; at the bottom one always does.
      num_heads: of the attentions; one number or one per level. Configs of diffusers call it attention_head_dim.
      cross_attention_dim: channels of the condition.
      use_linear_projection: the layers around the transformers are linear instead of 1x1 convolutions, which is the same but for the
        shapes in checkpoints.
      norm_num_groups: of the group normalisations.
      stack: UNets in series, under "units"; `grow` makes their parameters of those of a single one.
      dtype: of the convolutions and linear layers, but not of the time embedding and the last convolution.
      remat: see `layers.runner`; block by block.

    Raises:
      ValueError: settings that do not fit each other.
    """
    if num_classes:
        raise ValueError(
            f"num_classes is {num_classes}, expected 0: this network is conditioned on sequences; use unet_edm for labels."
        )
    if stack < 1:
        raise ValueError(f"stack is {stack}, expected 1 or more: the number of UNets in series.")
    settings = module_settings(
        block_out_channels, layers_per_block, attention, num_heads, norm_num_groups
    )
    settings |= dict(
        channels=channels,
        c_cond=cross_attention_dim,
        linear=use_linear_projection,
        dtype=jnp.dtype(dtype),
        remat=remat,
    )
    if stack == 1:
        return layers.functional(lambda rngs: UNet(rngs=rngs, **settings), INITIALIZERS)
    network = layers.functional(lambda rngs: Stack(stack, rngs=rngs, **settings), INITIALIZERS)
    return network._replace(grow=functools.partial(_grow, network.abstract))


def module_settings(
    block_out_channels, layers_per_block, attention, num_heads, norm_num_groups
) -> dict:
    """Settings of an `Encoder` from those of `unet`.

    Raises:
      ValueError: they do not fit each other.
    """
    heads = (
        (num_heads,) * len(block_out_channels) if isinstance(num_heads, int) else tuple(num_heads)
    )
    for name, value in (("attention", attention), ("num_heads", heads)):
        if len(value) != len(block_out_channels):
            raise ValueError(
                f"{name} has {len(value)} values, expected {len(block_out_channels)}: one per level of block_out_channels."
            )
    for width, h in zip(block_out_channels, heads, strict=True):
        for name, divisor in (("norm_num_groups", norm_num_groups), ("num_heads", h)):
            if width % divisor:
                raise ValueError(
                    f"block_out_channels {width} is not divisible by {name} {divisor}; change one of them."
                )
    settings = dict(
        widths=tuple(block_out_channels),
        layers_per_block=layers_per_block,
        attention=tuple(attention),
    )
    return settings | dict(heads=heads, num_groups=norm_num_groups)
