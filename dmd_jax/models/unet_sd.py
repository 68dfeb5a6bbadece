"""The UNet of Stable Diffusion 1.x and 2.x (Rombach et al., arXiv 2112.10752), and stacks of it.

It is diffusers' UNet2DConditionModel, and attribute names are the keys of its checkpoints. The time
embedding is float32 whatever the dtype of the trunk; so are the softmax of attentions, the
statistics of norms and the last convolution.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from dmd_jax.models import layers

CHOICES = ("unet",)  # what a config may name

PADDING = 1  # of convolutions that halve the resolution; the autoencoder's differs
INITIALIZERS = (
    (r"scale$", layers.ones),
    (r"bias$", layers.zeros),
    (r"(conv2|proj_out|conv_out)\.kernel$", layers.zeros),
    (r"kernel$", layers.kaiming_uniform),
)
FLOAT_LAYERS = (
    r"(^|/)conv_in$",
    r"(^|/)conv_out$",
    r"(^|/)(time_embedding/\w+|time_emb_proj)$",
)


class Attention(nnx.Module):
    """Attention of [B, L, C] over [B, M, c_context]."""

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
        self.norm1 = norm()
        self.attn1 = Attention(c, c, heads, dtype=dtype, rngs=rngs)
        self.norm2 = norm()
        self.attn2 = Attention(c, c_cond, heads, dtype=dtype, rngs=rngs)
        self.norm3 = norm()
        # What diffusers numbers 1 is dropout.
        net = {"0": nnx.Dict(proj=linear(c, 8 * c)), "2": linear(4 * c, c)}
        self.ff = nnx.Dict(net=nnx.Dict(net))

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


class Settings(NamedTuple):
    """The settings that a UNet and its ControlNet share; the defaults are Stable Diffusion 1.x's.

    2.x: num_heads (5, 10, 20, 20), cross_attention_dim 1024, use_linear_projection.

    Attributes:
      channels: of the latents.
      block_out_channels: channels per level; each level halves the resolution.
      layers_per_block: residual blocks per level in the encoder; the decoder has one more.
      attention: per level, whether a transformer follows each residual block; at the bottom one
        always does.
      num_heads: of the attentions; one number or one per level. Configs of diffusers call it
        attention_head_dim.
      cross_attention_dim: channels of the condition.
      use_linear_projection: whether the layers around the transformers are linear instead of 1x1
        convolutions, which is the same but for the shapes in checkpoints.
      norm_num_groups: of the group normalisations.
      dtype: of the convolutions and linear layers, but not of the time embedding and the last
        convolution.
      remat: see `layers.runner`; block by block.
    """

    channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)
    num_heads: int | tuple[int, ...] = 8
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    dtype: str = "float32"
    remat: bool | str = False


def checked(settings: Settings) -> Settings:
    """Returns the settings with `num_heads` as one number per level.

    Raises:
      ValueError: the settings do not fit each other.
    """
    widths = settings.block_out_channels
    heads = settings.num_heads
    if isinstance(heads, int):
        heads = (heads,) * len(widths)
    for name, values in (("attention", settings.attention), ("num_heads", heads)):
        if len(values) != len(widths):
            raise ValueError(
                f"{name} has {len(values)} values, expected {len(widths)}: "
                "one per level of block_out_channels."
            )
    for width, h in zip(widths, heads, strict=True):
        for name, divisor in (("norm_num_groups", settings.norm_num_groups), ("num_heads", h)):
            if width % divisor:
                raise ValueError(
                    f"block_out_channels {width} is not divisible by {name} {divisor}; "
                    "change one of them."
                )
    return settings._replace(num_heads=tuple(heads))


def time_embedding(settings: Settings, rngs: nnx.Rngs) -> nnx.Dict:
    """Builds the float32 layers that `embed` uses."""
    width = settings.block_out_channels[0]
    return nnx.Dict(
        linear_1=nnx.Linear(width, 4 * width, rngs=rngs),
        linear_2=nnx.Linear(4 * width, 4 * width, rngs=rngs),
    )


def conv_in(settings: Settings, rngs: nnx.Rngs) -> nnx.Conv:
    """Builds the first convolution."""
    width = settings.block_out_channels[0]
    return _conv(settings, rngs)(settings.channels, width)


def down_blocks(settings: Settings, rngs: nnx.Rngs) -> nnx.Dict:
    """Builds the levels of the encoder."""
    resnet = _resnet(settings, rngs)
    conv = _conv(settings, rngs)
    widths = settings.block_out_channels
    width_before = widths[0]
    stages = []
    for level, width in enumerate(widths):
        widths_in = [width_before, *[width] * (settings.layers_per_block - 1)]
        resnets = [resnet(c_in, width) for c_in in widths_in]
        attentions = []
        if settings.attention[level]:
            attentions = [_transformer(settings, level, rngs) for _ in resnets]
        halve = None
        if level < len(widths) - 1:
            halve = conv(width, width, strides=2, padding=PADDING)
        stages.append(layers.stage(resnets, attentions, down=halve))
        width_before = width
    return layers.numbered(stages)


def mid_block(settings: Settings, rngs: nnx.Rngs) -> nnx.Dict:
    """Builds the blocks at the lowest resolution."""
    resnet = _resnet(settings, rngs)
    width = settings.block_out_channels[-1]
    resnets = [resnet(width, width) for _ in range(2)]
    return layers.stage(resnets, [_transformer(settings, -1, rngs)])


def up_blocks(settings: Settings, rngs: nnx.Rngs) -> nnx.Dict:
    """Builds the levels of the decoder, from the lowest resolution to the highest."""
    resnet = _resnet(settings, rngs)
    conv = _conv(settings, rngs)
    skips = skip_channels(settings)
    widths = settings.block_out_channels
    width_before = widths[-1]
    stages = []
    for level in reversed(range(len(widths))):
        width = widths[level]
        widths_in = [width_before, *[width] * settings.layers_per_block]
        resnets = [resnet(c_in + skips.pop(), width) for c_in in widths_in]
        attentions = []
        if settings.attention[level]:
            attentions = [_transformer(settings, level, rngs) for _ in resnets]
        double = conv(width, width) if level else None
        stages.append(layers.stage(resnets, attentions, up=double))
        width_before = width
    return layers.numbered(stages)


def conv_norm_out(settings: Settings) -> layers.GroupNorm:
    """Builds the last normalisation, float32."""
    width = settings.block_out_channels[0]
    num_groups = settings.norm_num_groups
    return layers.GroupNorm(width, num_groups=num_groups, epsilon=1e-5, dtype=jnp.float32)


def conv_out(settings: Settings, rngs: nnx.Rngs) -> nnx.Conv:
    """Builds the last convolution, float32."""
    return nnx.Conv(settings.block_out_channels[0], settings.channels, (3, 3), rngs=rngs)


def skip_channels(settings: Settings) -> list[int]:
    """Returns the channels of each skip, in the order of `encode`."""
    widths = settings.block_out_channels
    levels = [[width] * (settings.layers_per_block + 1) for width in widths]
    return [widths[0], *itertools.chain(*levels)][:-1]  # the last level is not halved


def _conv(settings, rngs):
    dtype = jnp.dtype(settings.dtype)
    return functools.partial(nnx.Conv, kernel_size=(3, 3), dtype=dtype, rngs=rngs)


def _resnet(settings, rngs):
    return functools.partial(
        layers.ResnetBlock,
        c_emb=4 * settings.block_out_channels[0],
        num_groups=settings.norm_num_groups,
        epsilon=1e-5,
        dtype=jnp.dtype(settings.dtype),
        rngs=rngs,
    )


def _transformer(settings, level, rngs):
    return Transformer(
        settings.block_out_channels[level],
        settings.num_heads[level],
        c_cond=settings.cross_attention_dim,
        linear=settings.use_linear_projection,
        num_groups=settings.norm_num_groups,
        dtype=jnp.dtype(settings.dtype),
        rngs=rngs,
    )


def embed(time_embedding: nnx.Dict, noise: jax.Array) -> jax.Array:
    """Returns the embedding of labels [B] that every residual block sees: [B, 4 width], float32."""
    n = time_embedding.linear_1.in_features // 2
    emb = layers.cos_sin(noise, layers.positional_frequencies(n, endpoint=False))
    return time_embedding.linear_2(nnx.silu(time_embedding.linear_1(emb)))


def encode(module, run: Callable, x: jax.Array, emb: jax.Array, cond: jax.Array) -> tuple:
    """Runs the encoder and the middle.

    Args:
      module: has `down_blocks` and `mid_block`.
      run: see `layers.runner`.
      x: features of `conv_in`, [B, H, W, C].
      emb: of `embed`.
      cond: [B, L, D].

    Returns:
      The features after the middle, and the skips, of which the last is the first to be used.
    """
    skips = [x]
    for block in layers.in_order(module.down_blocks):
        for resnet, transformer in layers.residual_layers(block):
            x = _run_layer(run, resnet, transformer, x, emb, cond)
            skips.append(x)
        if "downsamplers" in block:
            x = block.downsamplers["0"].conv(x)
            skips.append(x)
    for resnet, transformer in layers.residual_layers(module.mid_block):
        x = _run_layer(run, resnet, transformer, x, emb, cond)
    return x, skips


def decode(module, run: Callable, x, skips: list, emb: jax.Array, cond: jax.Array) -> jax.Array:
    """Runs the decoder, `up_blocks`, on what `encode` returns; see there for the arguments."""
    skips = list(skips)
    for block in layers.in_order(module.up_blocks):
        for resnet, transformer in layers.residual_layers(block):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = _run_layer(run, resnet, transformer, x, emb, cond)
        if "upsamplers" in block:
            _, h, w, _ = skips[-1].shape
            x = block.upsamplers["0"].conv(layers.upsample(x)[:, :h, :w])
    return x


def _run_layer(run, resnet, transformer, x, emb, cond):
    x = run(resnet, x, emb)
    return run(transformer, x, cond) if transformer else x


def _head(module, x):
    """Returns what the network predicts, float32, of the features of `decode`."""
    return module.conv_out(nnx.silu(module.conv_norm_out(x)))


class UNet(nnx.Module):
    """See `unet`. `residuals` (of the middle, of each skip) are added to what the decoder sees."""

    def __init__(self, settings, rngs):
        self.run = layers.runner(settings.remat)
        self.time_embedding = time_embedding(settings, rngs)
        self.conv_in = conv_in(settings, rngs)
        self.down_blocks = down_blocks(settings, rngs)
        self.mid_block = mid_block(settings, rngs)
        self.up_blocks = up_blocks(settings, rngs)
        self.conv_norm_out = conv_norm_out(settings)
        self.conv_out = conv_out(settings, rngs)

    def __call__(self, x, noise, cond, residuals=None):
        x = self.conv_in(x)
        emb = embed(self.time_embedding, noise)
        x, skips = encode(self, self.run, x, emb, cond)
        if residuals is not None:
            x, skips = jax.tree.map(jnp.add, (x, skips), residuals)
        return _head(self, decode(self, self.run, x, skips, emb, cond))


class Stack(nnx.Module):
    """UNets in series: the features of each go into the next.

    The first one alone has a `conv_in`; the last one alone has `conv_norm_out` and `conv_out`.
    """

    def __init__(self, n, settings, rngs):
        self.run = layers.runner(settings.remat)
        units = [
            dict(
                time_embedding=time_embedding(settings, rngs),
                down_blocks=down_blocks(settings, rngs),
                mid_block=mid_block(settings, rngs),
                up_blocks=up_blocks(settings, rngs),
            )
            for _ in range(n)
        ]
        units[0] |= dict(conv_in=conv_in(settings, rngs))
        units[-1] |= dict(conv_norm_out=conv_norm_out(settings), conv_out=conv_out(settings, rngs))
        self.units = layers.numbered([nnx.Dict(unit) for unit in units])

    def __call__(self, x, noise, cond):
        units = layers.in_order(self.units)
        x = units[0].conv_in(x)
        for unit in units:
            emb = embed(unit.time_embedding, noise)
            x, skips = encode(unit, self.run, x, emb, cond)
            x = decode(unit, self.run, x, skips, emb, cond)
        return _head(units[-1], x)


def _grow(abstract, params):
    """Returns the parameters of a stack, of which each unit has those of one UNet that it needs.

    The units share arrays.
    """
    units = abstract["units"]
    one = units["0"] | units[str(len(units) - 1)]
    expected = traverse_util.flatten_dict(one, sep=".")
    actual = traverse_util.flatten_dict(params, sep=".")
    problems = [f"missing {path}" for path in expected if path not in actual]
    problems += [f"unused {path}" for path in actual if path not in expected]
    for path, a in expected.items():
        if path in actual and actual[path].shape != a.shape:
            problems.append(f"{path} has shape {actual[path].shape}, expected {a.shape}")
    if problems:
        raise ValueError(
            "a stack of UNets grows from the parameters of one with the same settings; "
            f"these differ: {'; '.join(problems)}."
        )
    return {
        "units": {name: {child: params[child] for child in unit} for name, unit in units.items()}
    }


def unet(*, size: int = 64, num_classes: int = 0, stack: int = 1, **shared) -> layers.Network:
    """Returns the network of Stable Diffusion's UNet:

    `(params, x [B, H, W, channels], noise [B], cond [B, L, cross_attention_dim])
    -> [B, H, W, channels]`, float32, for any height and width.

    With `stack` = 2 it is the "Stacked U-Net" of InstaFlow-1.7B (Liu et al., arXiv 2309.06380): two
    UNets in series with weights of their own. Both get the same label and text. The blocks between
    them that only turn features into latents and back are left out. No code or checkpoint of it is
    public, so which blocks those are is an interpretation: the first UNet's conv_norm_out and
    conv_out, and the second one's conv_in. 1,719,017,924 parameters remain.

    Args:
      size: usual height and width; the network does not depend on it.
      num_classes: 0, since the condition is a sequence.
      stack: number of UNets in series, under "units"; `grow` makes their parameters from those of a
        single one.
      shared: fields of `Settings`.

    Raises:
      ValueError: the settings do not fit each other.
    """
    if num_classes:
        raise ValueError(
            f"num_classes is {num_classes}, expected 0: this network is conditioned on sequences; "
            "use unet_edm for labels."
        )
    if stack < 1:
        raise ValueError(f"stack is {stack}, expected 1 or more: the number of UNets in series.")
    settings = checked(Settings(**shared))
    if stack == 1:
        return layers.functional(lambda rngs: UNet(settings, rngs), INITIALIZERS, FLOAT_LAYERS)
    network = layers.functional(
        lambda rngs: Stack(stack, settings, rngs), INITIALIZERS, FLOAT_LAYERS
    )
    return network._replace(grow=functools.partial(_grow, network.abstract))
