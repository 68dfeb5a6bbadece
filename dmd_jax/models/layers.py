"""What the networks share: layers, and a module as a function of its parameters.

The layers are flax's with this package's defaults.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

POLICIES = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
)


class Network(NamedTuple):
    """A module as pure functions.

    Attributes:
      apply: `(params, *inputs) -> output`.
      abstract: the parameters' shapes and dtypes, a nested dict.
      init: `seed -> params`, numpy arrays, the same on every machine; nothing is compiled.
      bind: `params -> module`, for the module's other methods.
      cast: `params -> params`, each in the precision of its layer, which then does not cast again.
      grow: `(params of the network that it is made of) -> params`; None if it is made of no other.
      float_layers: regexes of the layers that `quantize` leaves in float, over paths joined by "/".
    """

    apply: Callable
    abstract: dict
    init: Callable
    bind: Callable
    cast: Callable
    grow: Callable | None = None
    float_layers: tuple[str, ...] = ()


def functional(
    build: Callable[[Any], nnx.Module],
    initializers: tuple[tuple[str, Callable], ...],
    float_layers: tuple[str, ...] = (),
) -> Network:
    """Returns the `Network` of the module that `build` makes.

    Args:
      build: `rngs -> module`; it is only traced.
      initializers: rules `(regex, (rng, shape) -> array)`, see `assign`.
      float_layers: see `Network`.
    """
    module = nnx.eval_shape(lambda: build(_Rngs()))
    dtypes = {
        path: layer.dtype
        for path, layer in nnx.iter_modules(module)
        if isinstance(layer, nnx.Conv | nnx.Linear) and layer.dtype
    }
    graphdef, abstract = nnx.split(module)
    abstract = nnx.to_pure_dict(abstract)

    def init(seed):
        rng = np.random.default_rng(seed)
        makers = traverse_util.flatten_dict(assign(initializers, abstract))
        shapes = traverse_util.flatten_dict(abstract)
        leaves = {}
        for path, make in makers.items():
            leaves[path] = make(rng, shapes[path].shape).astype(np.float32)
        return traverse_util.unflatten_dict(leaves)

    def bind(params):
        return nnx.merge(graphdef, params)

    def cast(params):
        leaves = traverse_util.flatten_dict(params)
        return traverse_util.unflatten_dict(
            {path: a.astype(dtypes.get(path[:-1], a.dtype)) for path, a in leaves.items()}
        )

    def apply(params, *inputs):
        return bind(params)(*inputs)

    return Network(apply, abstract, init, bind, cast, float_layers=float_layers)


class _Rngs:
    """Replaces nnx.Rngs, whose counters take most of the time of tracing a large network."""

    def params(self):
        return jax.random.key(0)


def numbered(modules: Sequence) -> nnx.Dict:
    """Returns children under the names "0", "1", ..., as in PyTorch's ModuleList."""
    return nnx.Dict({str(i): module for i, module in enumerate(modules)})


def in_order(modules: nnx.Dict) -> list:
    """Returns the modules of `numbered` as a list."""
    return [modules[str(i)] for i in range(len(modules))]


def runner(remat: bool | str) -> Callable:
    """Returns `(module, *inputs) -> output`, which runs a module.

    Args:
      remat: True to recompute the module's activations in the backward pass instead of storing
        them, False to store them. A name of jax.checkpoint_policies recomputes those that this
        policy does not save.

    Raises:
      ValueError: there is no such policy.
    """
    if not remat:
        return _run
    if remat is True:
        return nnx.remat(_run)
    if remat not in POLICIES:
        raise ValueError(
            f"no remat policy {remat!r}; use True, False or one of {', '.join(POLICIES)}."
        )
    return nnx.remat(_run, policy=getattr(jax.checkpoint_policies, remat))


def _run(module, *inputs):
    return module(*inputs)


class GroupNorm(nnx.Module):
    """Group normalisation of [B, H, W, C], with statistics in float32.

    It differs from flax's in two ways. Pixels are averaged before the channels of a group, which
    takes a tenth off a training step on a CPU. The variance is the mean of (x - mean)^2, which does
    not cancel on nearly constant feature maps.
    """

    def __init__(self, channels: int, *, num_groups: int, epsilon: float, dtype):
        self.num_groups = num_groups
        self.epsilon = epsilon
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x):
        x = x.astype(jnp.float32)
        x = x - self._group_mean(x)
        scale, bias = (p[...][None, None, None] for p in (self.scale, self.bias))
        gain = jax.lax.rsqrt(self._group_mean(x**2) + self.epsilon) * scale
        return (x * gain + bias).astype(self.dtype)

    def _group_mean(self, x):
        """Returns the mean of each image's group, for each of its channels: [B, 1, 1, C]."""
        b, _, _, c = x.shape
        mean = x.mean(axis=(1, 2)).reshape(b, self.num_groups, -1).mean(axis=-1)
        return jnp.repeat(mean, c // self.num_groups, axis=-1)[:, None, None]


def layer_norm(channels: int, *, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Returns PyTorch's layer normalisation, with statistics in float32.

    The variance is the mean of (x - mean)^2.
    """
    return nnx.LayerNorm(channels, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)


class ResnetBlock(nnx.Module):
    """The residual block of diffusers: [B, H, W, c_in] to [B, H, W, c_out].

    It may take an embedding [B, c_emb].
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        c_emb: int | None = None,
        num_groups: int,
        epsilon: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(nnx.Conv, dtype=dtype, rngs=rngs)
        norm = functools.partial(GroupNorm, num_groups=num_groups, epsilon=epsilon, dtype=dtype)
        self.norm1 = norm(c_in)
        self.conv1 = conv(c_in, c_out, (3, 3))
        if c_emb:
            self.time_emb_proj = nnx.Linear(c_emb, c_out, rngs=rngs)
        self.norm2 = norm(c_out)
        self.conv2 = conv(c_out, c_out, (3, 3))
        if c_in != c_out:
            self.conv_shortcut = conv(c_in, c_out, (1, 1))

    def __call__(self, x, emb=None):
        h = self.conv1(nnx.silu(self.norm1(x)))
        if emb is not None:
            h += self.time_emb_proj(nnx.silu(emb))[:, None, None].astype(h.dtype)
        h = self.conv2(nnx.silu(self.norm2(h)))
        if hasattr(self, "conv_shortcut"):
            x = self.conv_shortcut(x)
        return x + h


def stage(
    resnets: Sequence,
    attentions: Sequence = (),
    *,
    down: nnx.Conv | None = None,
    up: nnx.Conv | None = None,
) -> nnx.Dict:
    """Returns the layers of a UNet or an autoencoder at one resolution, under diffusers' names.

    Args:
      resnets: residual blocks.
      attentions: each follows the residual block of its number.
      down: the convolution that halves the resolution at the end, if any.
      up: the convolution that follows a doubling of the resolution at the end, if any.
    """
    resamplers = {
        name: numbered([nnx.Dict(conv=conv)])
        for name, conv in (("downsamplers", down), ("upsamplers", up))
        if conv
    }
    return nnx.Dict(resnets=numbered(resnets), attentions=numbered(attentions), **resamplers)


def residual_layers(block: nnx.Dict) -> Iterator[tuple]:
    """Yields each residual block of a `stage` with the attention that follows it, or None."""
    return itertools.zip_longest(in_order(block.resnets), in_order(block.attentions))


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, is_causal: bool = False) -> jax.Array:
    """Returns softmax attention, with the softmax in float32.

    On GPUs it is cuDNN's flash attention, where that is possible: in 16 bits, with heads whose
    width is a multiple of 8 up to 128.

    Args:
      q: queries, [B, L, heads, D].
      k: keys, [B, M, heads, D].
      v: values, [B, M, heads, D].
      is_causal: whether a query sees no later keys.

    Returns:
      [B, L, heads, D].
    """
    flash = (
        jax.default_backend() == "gpu"
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
    )
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=is_causal, implementation="cudnn" if flash else "xla"
    )


def gelu(x: jax.Array) -> jax.Array:
    """Returns x Phi(x), the exact GELU (Hendrycks and Gimpel, arXiv 1606.08415, section 2).

    It is jax.nn.gelu(approximate=False) with a derivative that works inside jax.shard_map.
    """
    return x * _normal_cdf(x)


# Its derivative is stated because jax 0.12 cannot differentiate erf and erfc inside jax.shard_map:
# "Primitive polynomial requires varying manual axes to match".
@jax.custom_jvp
def _normal_cdf(x):
    """Returns Phi(x), the cumulative distribution function of the standard normal distribution."""
    return 0.5 * jax.lax.erfc(-x * np.sqrt(0.5).astype(x.dtype))


@_normal_cdf.defjvp
def _normal_cdf_jvp(primals, tangents):
    """Returns Phi(x) and phi(x) dx, where phi is the density."""
    (x,) = primals
    (dx,) = tangents
    density = np.sqrt(0.5 / np.pi).astype(x.dtype) * jnp.exp(-0.5 * x**2)
    return _normal_cdf(x), density * dx


def zeros(rng, shape):
    """Returns zeros."""
    return np.zeros(shape)


def ones(rng, shape):
    """Returns ones."""
    return np.ones(shape)


def normal(scale: float) -> Callable:
    """Returns the Gaussian initializer of standard deviation `scale`."""
    return lambda rng, shape: scale * rng.standard_normal(shape)


def kaiming_uniform(rng, shape):
    """Draws kernels [..., in, out] as PyTorch does by default: uniform within 1 / sqrt(fan_in)."""
    return rng.uniform(-1, 1, shape) / np.sqrt(np.prod(shape[:-1]))


def xavier_uniform(gain: float = 1.0) -> Callable:
    """Returns Glorot and Bengio's uniform initializer times `gain`, for kernels [..., in, out]."""

    def make(rng, shape):
        fans = np.prod(shape[:-2]) * (shape[-2] + shape[-1])
        return gain * np.sqrt(6 / fans) * rng.uniform(-1, 1, shape)

    return make


def positional_frequencies(n: int, *, endpoint: bool, max_period: float = 10000.0) -> jax.Array:
    """Returns `n` frequencies that fall geometrically from 1 to 1 / max_period.

    Args:
      n: number of frequencies.
      endpoint: whether the last one is 1 / max_period, or would be the next one.
      max_period: the ratio of the ends.
    """
    return max_period ** -(jnp.arange(n, dtype=jnp.float32) / (n - endpoint))


def cos_sin(t: jax.Array, freqs: jax.Array) -> jax.Array:
    """Returns cosine and sine of `t` [B] at the angular frequencies `freqs` [D / 2]: [B, D]."""
    angles = t.astype(jnp.float32)[:, None] * freqs[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def upsample(x: jax.Array) -> jax.Array:
    """Doubles the resolution by nearest neighbours: [B, H, W, C] to [B, 2H, 2W, C]."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def downsample(x: jax.Array) -> jax.Array:
    """Returns the mean of each 2x2 pixels: [B, H, W, C] to [B, H/2, W/2, C]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def smooth(x: jax.Array, padding: int = 1) -> jax.Array:
    """Filters [B, H, W, C] by (1, 2, 1) / 4 along height and width, with `padding` zeros around."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
    return (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4


def assign(rules: tuple[tuple[str, Any], ...], params: dict) -> dict:
    """Returns the tree of `params` with, in each leaf, the value of the first rule that matches it.

    A rule (regex, value) matches a leaf if its regex is found in the leaf's path, "a.b.c".

    Raises:
      ValueError: no rule matches a parameter, or a rule matches no parameter.
    """
    paths = traverse_util.flatten_dict(params, sep=".")
    matches = {path: [value for regex, value in rules if re.search(regex, path)] for path in paths}
    unmatched = [path for path, values in matches.items() if not values]
    idle = [regex for regex, _ in rules if not any(re.search(regex, path) for path in paths)]
    if unmatched or idle:
        raise ValueError(
            f"parameters that no rule matches: {unmatched}; rules that match no parameter: {idle}."
        )
    return traverse_util.unflatten_dict(
        {path: values[0] for path, values in matches.items()}, sep="."
    )
