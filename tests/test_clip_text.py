"""Parity with transformers, and the mistakes that would break it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmd_jax.models import clip_text, layers
from tests import test_features
from tests.test_unet_sd import TOLERANCE, change_epsilon, checksum, error, params_of, randomize

torch = pytest.importorskip("torch")

SETTINGS = dict(vocab_size=60, hidden_size=32, intermediate_size=64, num_heads=4)
EOS = 59


def make(act="quick_gelu", **settings):
    return clip_text.clip(**SETTINGS, num_layers=2, act=act, **settings)


@pytest.fixture(scope="module")
def ids():
    """Two texts, padded with the end-of-text token, as Stable Diffusion 1.x wants it."""
    ids = np.full((2, 77), EOS)
    for row, length in zip(ids, (5, 40), strict=True):
        row[:length] = np.random.default_rng(length).integers(1, EOS, length)
    return ids


@functools.cache
def oracle(act):
    test_features.import_torchvision()  # transformers does, too
    transformers = pytest.importorskip("transformers")
    settings = {name.replace("heads", "attention_heads"): value for name, value in SETTINGS.items()}
    config = transformers.CLIPTextConfig(
        **settings, num_hidden_layers=2, hidden_act=act, eos_token_id=EOS
    )
    return randomize(transformers.CLIPTextModel(config).eval(), r"embedding|out_proj|fc2")


@pytest.fixture(scope="module")
def params():
    return params_of(oracle("quick_gelu"), make())


@pytest.fixture(scope="module")
def output(params, ids):
    return np.asarray(make().apply(params, ids))


@pytest.mark.parametrize("act", clip_text.ACTIVATIONS)
def test_parity_at_all_positions(act, params, ids, output):
    with torch.no_grad():
        expected = oracle(act)(torch.from_numpy(ids)).last_hidden_state
    result = output if act == "quick_gelu" else make(act).apply(params, ids)
    assert result.shape == (2, 77, 32) and result.dtype == np.float32
    assert error(result, expected) < TOLERANCE


def the_other_gelu(monkeypatch):  # trap 9
    monkeypatch.setitem(clip_text.ACTIVATIONS, "quick_gelu", clip_text.ACTIVATIONS["gelu"])


def look_ahead(monkeypatch):
    right = layers.attention
    monkeypatch.setattr(layers, "attention", lambda q, k, v, is_causal: right(q, k, v))


def mask_the_padding(monkeypatch):  # trap 12
    mask = (np.arange(77) < np.array([[6], [41]]))[:, None, None]

    def attention(q, k, v, is_causal):
        return jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask), is_causal=is_causal)

    monkeypatch.setattr(layers, "attention", attention)


def flaxs_epsilon(monkeypatch):  # trap 10
    change_epsilon(monkeypatch, nnx.LayerNorm, 1e-5, 1e-6)


@pytest.mark.parametrize("mistake", [the_other_gelu, look_ahead, mask_the_padding, flaxs_epsilon])
def test_parity_would_show_mistakes(monkeypatch, params, ids, output, mistake):
    mistake(monkeypatch)
    assert error(make().apply(params, ids), output) > 10 * TOLERANCE


def test_padding_with_zero_shows_in_the_padded_rows_alone(params, ids, output):  # trap 12
    length = 6
    wrong = make().apply(params, np.where(np.arange(77)[None] < length, ids, 0))
    assert (
        error(wrong[0, :length], output[0, :length])
        < TOLERANCE
        < 0.1
        < error(wrong[0, length:], output[0, length:])
    )


def test_the_public_checkpoints_parameters():
    network = clip_text.clip()
    assert sum(a.size for a in jax.tree.leaves(network.abstract)) == 123_060_480
    assert (
        checksum(network.abstract)
        == "0240ea74fae34c19a2b92936882746abfaecad35ffed019f943f0eeaef38847a"
    )


def test_activations_pointwise():  # traps 7 and 9
    x, erf = jnp.float32(2.27), 0.98839704
    np.testing.assert_allclose(clip_text.ACTIVATIONS["gelu"](x), 2.27 * erf, rtol=1e-6)
    np.testing.assert_allclose(
        clip_text.ACTIVATIONS["quick_gelu"](x), 2.27 / (1 + np.exp(-1.702 * 2.27)), rtol=1e-6
    )


def test_bfloat16_is_close(params, ids, output):
    half = jax.jit(make(dtype="bfloat16").apply)(params, ids)
    assert half.dtype == jnp.float32 and 1e-4 < error(half, output) < 3e-2


def test_initial_parameters():
    network = make()
    chex.assert_trees_all_equal_shapes_and_dtypes(network.init(0), network.abstract)


def test_settings_and_texts_that_do_not_fit(params):
    with pytest.raises(ValueError, match=r"^no activation 'relu'; use one of quick_gelu, gelu.$"):
        clip_text.clip(act="relu")
    with pytest.raises(
        ValueError, match=r"^hidden_size 768 is not divisible by num_heads 7; change one of them.$"
    ):
        clip_text.clip(num_heads=7)
    with pytest.raises(ValueError, match=r"^the text has 78 tokens, expected at most 77; cut it.$"):
        make().apply(params, np.zeros((1, 78), int))
