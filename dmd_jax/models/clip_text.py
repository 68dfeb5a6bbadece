"""The text encoder of CLIP (Radford et al., arXiv 2103.00020), transformers' CLIPTextModel.

Attribute names are the keys of the checkpoints without their "text_model.". Padding is not masked,
because Stable Diffusion sees it too.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from dmd_jax.models import layers

CHOICES = ("clip",)  # what a config may name


def quick_gelu(x):
    """Returns OpenAI's approximation of the GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable] = {"quick_gelu": quick_gelu, "gelu": layers.gelu}
INITIALIZERS = (
    (r"scale$", layers.ones),
    (r"bias$", layers.zeros),
    (r"(kernel|embedding)$", layers.normal(0.02)),
)


class Layer(nnx.Module):
    """Self-attention, which may be causal, and a feed-forward layer on [B, L, D]."""

    def __init__(self, c, c_hidden, heads, *, act, is_causal, dtype, rngs):
        linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.heads = heads
        self.act = act
        self.is_causal = is_causal
        self.layer_norm1 = layers.layer_norm(c, dtype=dtype, rngs=rngs)
        self.layer_norm2 = layers.layer_norm(c, dtype=dtype, rngs=rngs)
        self.self_attn = nnx.Dict({f"{name}_proj": linear(c, c) for name in ("q", "k", "v", "out")})
        self.mlp = nnx.Dict(fc1=linear(c, c_hidden), fc2=linear(c_hidden, c))

    def __call__(self, x):
        h = self.layer_norm1(x)
        attn = self.self_attn
        q, k, v = (
            project(h).reshape(*h.shape[:2], self.heads, -1)
            for project in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        h = layers.attention(q, k, v, is_causal=self.is_causal)
        x = x + attn.out_proj(h.reshape(x.shape))
        return x + self.mlp.fc2(self.act(self.mlp.fc1(self.layer_norm2(x))))


class Transformer(nnx.Module):
    """The layers of a tower."""

    def __init__(
        self, *, rngs, hidden_size, intermediate_size, num_layers, num_heads, act, is_causal, dtype
    ):
        settings = dict(act=ACTIVATIONS[act], is_causal=is_causal, dtype=dtype, rngs=rngs)
        self.layers = layers.numbered(
            [
                Layer(hidden_size, intermediate_size, num_heads, **settings)
                for _ in range(num_layers)
            ]
        )

    def __call__(self, x):
        for layer in layers.in_order(self.layers):
            x = layer(x)
        return x


class TextEncoder(nnx.Module):
    """See `clip` for the arguments."""

    def __init__(self, *, rngs, vocab_size, hidden_size, max_length, dtype, **settings):
        embed = functools.partial(nnx.Embed, features=hidden_size, dtype=dtype, rngs=rngs)
        self.embeddings = nnx.Dict(
            token_embedding=embed(vocab_size), position_embedding=embed(max_length)
        )
        self.encoder = Transformer(
            rngs=rngs, hidden_size=hidden_size, is_causal=True, dtype=dtype, **settings
        )
        self.final_layer_norm = layers.layer_norm(hidden_size, dtype=jnp.float32, rngs=rngs)

    def __call__(self, ids):
        max_length = self.embeddings.position_embedding.num_embeddings
        if ids.shape[1] > max_length:
            raise ValueError(
                f"the text has {ids.shape[1]} tokens, expected at most {max_length}; cut it."
            )
        tokens = self.embeddings.token_embedding(ids)
        positions = self.embeddings.position_embedding(jnp.arange(ids.shape[1]))
        return self.final_layer_norm(self.encoder(tokens + positions[None]))


def clip(
    *,
    vocab_size: int = 49408,
    hidden_size: int = 768,
    intermediate_size: int = 3072,
    num_layers: int = 12,
    num_heads: int = 12,
    max_length: int = 77,
    act: str = "quick_gelu",
    dtype: str = "float32",
) -> layers.Network:
    """Returns the network of the text encoder:

    `(params, ids [B, L]) -> last hidden state [B, L, hidden_size]`, float32, after the last norm,
    with L up to `max_length`.

    The defaults are those of Stable Diffusion 1.x. 2.x: hidden_size 1024, intermediate_size 4096,
    num_layers 23, num_heads 16, act "gelu".

    Args:
      vocab_size: ids are below it.
      hidden_size: channels.
      intermediate_size: channels in the feed-forward layers.
      num_layers: of the transformer.
      num_heads: of each attention.
      max_length: positions that have an embedding.
      act: activation of the feed-forward layers, "quick_gelu" or "gelu".
      dtype: of everything but the last norm.

    Raises:
      ValueError: the activation is unknown, or the heads do not divide the channels.
    """
    settings = dict(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        max_length=max_length,
        act=act,
        dtype=jnp.dtype(dtype),
    )
    check(settings)
    return layers.functional(lambda rngs: TextEncoder(rngs=rngs, **settings), INITIALIZERS)


def check(tower: Mapping):
    """Checks the settings of a tower.

    Raises:
      ValueError: the activation is unknown, or the heads do not divide the channels.
    """
    act = tower["act"]
    hidden_size = tower["hidden_size"]
    num_heads = tower["num_heads"]
    if act not in ACTIVATIONS:
        raise ValueError(f"no activation {act!r}; use one of {', '.join(ACTIVATIONS)}.")
    if hidden_size % num_heads:
        raise ValueError(
            f"hidden_size {hidden_size} is not divisible by num_heads {num_heads}; "
            "change one of them."
        )
