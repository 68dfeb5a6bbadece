"""What the networks share: layers of flax with this package's defaults, and a module as a function of its parameters."""

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
      init: `seed -> params`, numpy arrays: the same on every machine, and made without compiling anything.
      bind: `params -> module`, for what else the module can do.
      cast: `params -> params`, each in the precision that its layer computes in, which then casts no more.
      grow: `(params of the network that it is made of) -> params`; None if it is made of no other.
    """

    apply: Callable
    abstract: dict
    init: Callable
    bind: Callable
    cast: Callable
    grow: Callable | None = None


def functional(
    build: Callable[[nnx.Rngs], nnx.Module], initializers: tuple[tuple[str, Callable], ...]
) -> Network:
    """The `Network` of the module that `build` makes.

    Args:
      build: `rngs -> module`; only traced.
      initializers: rules `(regex, (rng, shape) -> array)`, see `assign`.
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
        leaves = {
            path: make(rng, a.shape)
            for (path, make), a in zip(makers.items(), jax.tree.leaves(abstract), strict=True)
        }
        return traverse_util.unflatten_dict(
            {path: leaf.astype(np.float32) for path, leaf in leaves.items()}
        )

    def bind(params):
        return nnx.merge(graphdef, params)

    def cast(params):
        leaves = traverse_util.flatten_dict(params)
        return traverse_util.unflatten_dict(
            {path: a.astype(dtypes.get(path[:-1], a.dtype)) for path, a in leaves.items()}
        )

    return Network(lambda params, *inputs: bind(params)(*inputs), abstract, init, bind, cast)


class _Rngs:
    """Instead of nnx.Rngs, whose counters take most of the time of tracing a large network."""

    def params(self):
        return jax.random.key(0)


def numbered(modules: Sequence) -> nnx.Dict:
    """Children under the names "0", "1", ..., as in PyTorch's ModuleList."""
    return nnx.Dict({str(i): module for i, module in enumerate(modules)})


def in_order(modules: nnx.Dict) -> list:
    """What `numbered` was given."""
    return [modules[str(i)] for i in range(len(modules))]


def runner(remat: bool | str) -> Callable:
    """`(module, *inputs) -> output`.

    Args:
      remat: recompute the module's activations in the backward pass instead of storing them: all of them, or those that the named one of
        jax.checkpoint_policies does not save.

    Raises:
      ValueError: no such policy.
    """
    if isinstance(remat, str) and remat not in POLICIES:
        raise ValueError(
            f"no remat policy {remat!r}; use True, False or one of {', '.join(POLICIES)}."
        )
    if not remat:
        return _run
    return nnx.remat(
        _run, policy=getattr(jax.checkpoint_policies, remat) if isinstance(remat, str) else None
    )


def _run(module, *inputs):
    return module(*inputs)


class GroupNorm(nnx.Module):
    """Group normalisation of [B, H, W, C], statistics in float32.

    Against flax's own: pixels are averaged before the channels of a group, which takes a tenth off a training step on a CPU, and the
    variance is the mean of (x - mean)^2, which does not cancel on nearly constant feature maps.
    """

    def __init__(self, channels: int, *, num_groups: int, epsilon: float, dtype):
        self.num_groups, self.epsilon, self.dtype = num_groups, epsilon, dtype
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x):
        x = x.astype(jnp.float32)
        x = x - self._group_mean(x)
        scale, bias = (p[...][None, None, None] for p in (self.scale, self.bias))
        return (x * (jax.lax.rsqrt(self._group_mean(x**2) + self.epsilon) * scale) + bias).astype(
            self.dtype
        )

    def _group_mean(self, x):
        """[B, 1, 1, C]"""
        b, _, _, c = x.shape
        mean = x.mean(axis=(1, 2)).reshape(b, self.num_groups, -1).mean(axis=-1)
        return jnp.repeat(mean, c // self.num_groups, axis=-1)[:, None, None]


def layer_norm(channels: int, *, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """PyTorch's layer normalisation, statistics in float32; the variance is the mean of (x - mean)^2."""
    return nnx.LayerNorm(channels, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)


class ResnetBlock(nnx.Module):
    """The residual block of diffusers, [B, H, W, c_in] to [B, H, W, c_out], with an embedding [B, c_emb] or without."""

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
        self.norm1, self.conv1 = norm(c_in), conv(c_in, c_out, (3, 3))
        if c_emb:
            self.time_emb_proj = nnx.Linear(c_emb, c_out, rngs=rngs)
        self.norm2, self.conv2 = norm(c_out), conv(c_out, c_out, (3, 3))
        if c_in != c_out:
            self.conv_shortcut = conv(c_in, c_out, (1, 1))

    def __call__(self, x, emb=None):
        h = self.conv1(nnx.silu(self.norm1(x)))
        if emb is not None:
            h += self.time_emb_proj(nnx.silu(emb))[:, None, None].astype(h.dtype)
        h = self.conv2(nnx.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h


def stage(
    resnets: Sequence,
    attentions: Sequence = (),
    *,
    down: nnx.Conv | None = None,
    up: nnx.Conv | None = None,
) -> nnx.Dict:
    """What a UNet or an autoencoder has at one resolution, by diffusers' names.

    Args:
      resnets: residual blocks.
      attentions: each follows the residual block of its number.
      down: the convolution that halves the resolution afterwards.
      up: the convolution after the resolution was doubled.
    """
    resamplers = {
        name: numbered([nnx.Dict(conv=conv)])
        for name, conv in (("downsamplers", down), ("upsamplers", up))
        if conv
    }
    return nnx.Dict(resnets=numbered(resnets), attentions=numbered(attentions), **resamplers)


def residual_layers(block: nnx.Dict) -> Iterator[tuple]:
    """Each residual block of a `stage`, and the attention that follows it or None."""
    return itertools.zip_longest(in_order(block.resnets), in_order(block.attentions))


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, is_causal: bool = False) -> jax.Array:
    """Softmax attention of queries [B, L, heads, D] over keys and values [B, M, heads, D]: [B, L, heads, D], softmax in float32.

    On GPUs by cuDNN's flash attention, where that can: 16 bits, and heads of a multiple of 8 up to 128 wide.
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
    return np.zeros(shape)


def ones(rng, shape):
    return np.ones(shape)


def normal(scale: float) -> Callable:
    """Gaussian of standard deviation `scale`."""
    return lambda rng, shape: scale * rng.standard_normal(shape)


def kaiming_uniform(rng, shape):
    """PyTorch's default for kernels [..., in, out]: uniform within 1 / sqrt(fan_in)."""
    return rng.uniform(-1, 1, shape) / np.sqrt(np.prod(shape[:-1]))


def xavier_uniform(gain: float = 1.0) -> Callable:
    """Glorot and Bengio's uniform initializer times `gain`, for kernels [..., in, out]."""

    def make(rng, shape):
        receptive = np.prod(shape[:-2])
        return gain * np.sqrt(6 / (receptive * (shape[-2] + shape[-1]))) * rng.uniform(-1, 1, shape)

    return make


def positional_frequencies(n: int, *, endpoint: bool, max_period: float = 10000.0) -> jax.Array:
    """`n` frequencies falling geometrically from 1, to 1 / max_period if that `endpoint` is included."""
    return max_period ** -(jnp.arange(n, dtype=jnp.float32) / (n - endpoint))


def cos_sin(t: jax.Array, freqs: jax.Array) -> jax.Array:
    """Cosine and sine of `t` [B] at angular frequencies `freqs` [D / 2]: [B, D], float32."""
    angles = t.astype(jnp.float32)[:, None] * freqs[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def upsample(x: jax.Array) -> jax.Array:
    """Nearest neighbour, [B, H, W, C] to [B, 2H, 2W, C]."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def downsample(x: jax.Array) -> jax.Array:
    """The mean of each 2x2 pixels, [B, H, W, C] to [B, H/2, W/2, C]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def smooth(x: jax.Array, padding: int = 1) -> jax.Array:
    """The filter (1, 2, 1) / 4 along height and width of [B, H, W, C], after `padding` zeros on each side."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    x = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4
    return (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4


def assign(rules: tuple[tuple[str, Any], ...], params: dict) -> dict:
    """The tree of `params` with the value of the first rule whose regex is found in each leaf's path.

    Raises:
      ValueError: a parameter that no rule matches, or a rule that matches no parameter.
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
