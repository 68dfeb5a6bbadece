"""Parity with EDM's own code, and the mistakes that would break it."""

import pathlib
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmd_jax import denoiser, process
from dmd_jax.models import layers, unet_edm
from dmd_jax.weights import convert

GOLDEN = pathlib.Path(__file__).parent / "data" / "edm_golden.npz"
TOLERANCE = 1e-4  # of the parity test


def random_params(abstract):
    """The golden file's parameters: a random generator per name."""

    def draw(name, a):
        w = np.random.RandomState(zlib.crc32(f"model.{name}".encode()) & 0x7FFFFFFF).standard_normal(a.shape)
        if a.ndim >= 2:
            w /= np.sqrt(np.prod(a.shape[1:]))
        elif name.endswith(".bias"):
            w *= 0.1
        else:
            w = 1 + 0.1 * w
        return w.astype(np.float32)

    shapes = convert.to_torch(jax.tree.map(lambda a: np.empty(a.shape, np.float32), abstract))
    return convert.from_torch({name: draw(name, a) for name, a in shapes.items()}, abstract)


@pytest.fixture(scope="module")
def params(network):
    return random_params(network.abstract)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, 8, 8, 1), dtype=np.float32), np.float32([-0.3, 0.5, 1.1]), np.int32([1, 3, 7])


@pytest.mark.parametrize(
    ("name", "num_classes", "num_params", "labels"),
    [
        ("cifar10_uncond_vp", 0, 55_733_891, {"D": None}),
        ("cifar10_cond_vp", 10, 55_735_299, {"D": [1, 3, 7], "D_zero_label": [10, 10, 10]}),
    ],
)
def test_golden_parity(name, num_classes, num_params, labels):
    network = unet_edm.make(size=32, channels=3, num_classes=num_classes)
    unused = 9 * 128  # map_augment, which only EDM's training feeds
    assert sum(a.size for a in jax.tree.leaves(network.abstract)) == num_params - unused
    rng = np.random.RandomState(2024)
    y, noise = np.clip(0.5 * rng.standard_normal((3, 3, 32, 32)), -1, 1), rng.standard_normal((3, 3, 32, 32))
    sigma = np.float32([0.3, 7, 80])
    x = y.astype(np.float32) + sigma.reshape(3, 1, 1, 1) * noise.astype(np.float32)

    cases = len(labels)  # in one batch
    x, sigma = np.tile(x.transpose(0, 2, 3, 1), (cases, 1, 1, 1)), np.tile(sigma, cases)
    label = np.concatenate(list(labels.values())) if num_classes else None
    x_hat = jax.jit(denoiser.Denoiser(network.apply, process.EDM()))(random_params(network.abstract), x, sigma, label)
    golden = np.load(GOLDEN)
    for ours, case in zip(np.split(x_hat, cases), labels, strict=True):
        np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), golden[f"{name}/{case}"], rtol=0, atol=TOLERANCE)


def flip_sin_and_cos(monkeypatch):
    right = layers.positional_embedding
    monkeypatch.setattr(layers, "positional_embedding", lambda t, dim: jnp.roll(right(t, dim), dim // 2, axis=-1))


def leave_out_the_endpoint(monkeypatch):
    right = layers.positional_embedding  # 10000^(-i / n), not 10000^(-i / (n - 1))
    monkeypatch.setattr(layers, "positional_embedding", lambda t, dim: right(t, dim, 10000.0 ** ((dim // 2 - 1) / (dim // 2))))


def keep_q_k_and_v_apart(monkeypatch):
    right = unet_edm.Block._attention

    def wrong(self, qkv):
        return right(self, jnp.stack(jnp.split(qkv, 3, axis=-1), axis=-1).reshape(qkv.shape))

    monkeypatch.setattr(unet_edm.Block, "_attention", wrong)


def convolve_before_resampling(monkeypatch):
    right = unet_edm.Block.__call__

    def wrong(self, x, emb):
        if not self.resample:
            return right(self, x, emb)
        h = self.resample(self.conv0(nnx.silu(self.norm0(x)))) + self.affine(emb)[:, None, None]
        return (self.skip(self.resample(x)) + self.conv1(nnx.silu(self.norm1(h)))) * unet_edm.SQRT_HALF

    monkeypatch.setattr(unet_edm.Block, "__call__", wrong)


def leave_labels_unscaled(monkeypatch):
    right = jax.nn.one_hot
    monkeypatch.setattr(jax.nn, "one_hot", lambda label, n: right(label, n) / n**0.5)


def scale_once_by_sqrt_half(monkeypatch):
    right = unet_edm.Block.__call__
    monkeypatch.setattr(unet_edm.Block, "__call__", lambda self, x, emb: right(self, x, emb) / unet_edm.SQRT_HALF ** bool(self.heads))


MISTAKES = (
    flip_sin_and_cos,
    leave_out_the_endpoint,
    keep_q_k_and_v_apart,
    convolve_before_resampling,
    leave_labels_unscaled,
    scale_once_by_sqrt_half,
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_parity_would_show_mistakes(monkeypatch, network, params, inputs, mistake):
    expected = network.apply(params, *inputs)
    mistake(monkeypatch)
    assert np.abs(network.apply(params, *inputs) - expected).max() > 10 * TOLERANCE


def test_group_norm_on_a_nearly_constant_map():
    rng = np.random.default_rng(0)
    x = (5 + 1e-3 * rng.standard_normal((2, 8, 8, 16))).astype(np.float32)
    norm = unet_edm._group_norm(16, dtype=jnp.float32)  # 4 groups
    norm.scale[...], norm.bias[...] = (jnp.asarray(rng.standard_normal(16), jnp.float32) for _ in range(2))
    groups = x.astype(np.float64).reshape(2, 64, 4, 4)
    mean, variance = groups.mean(axis=(1, 3), keepdims=True), groups.var(axis=(1, 3), keepdims=True)
    scale, bias = np.asarray(norm.scale[...]), np.asarray(norm.bias[...])
    expected = {eps: ((groups - mean) / np.sqrt(variance + eps)).reshape(x.shape) * scale + bias for eps in (1e-6, 1e-5)}
    np.testing.assert_allclose(norm(x), expected[1e-6], atol=2e-3)
    assert np.abs(norm(x) - expected[1e-5]).max() > 0.1  # the epsilon of PyTorch and of ADM


def test_positional_embedding_goldens():
    embedding = layers.positional_embedding(np.log(np.float32([80])) / 4, 8)
    sin, cos = [0.889160, 0.0508271, 0.00236020, 1.09551e-4], [0.457596, 0.998707, 0.999997, 1.0]
    np.testing.assert_allclose(embedding[0], sin + cos, atol=2e-6)


def test_bfloat16_is_close_and_its_embedding_is_float32(monkeypatch, tiny, network, params, inputs):
    embeddings = []

    def run(block, x, emb):
        embeddings.append(emb)
        return block(x, emb)

    monkeypatch.setattr(unet_edm, "_run", run)
    expected = network.apply(params, *inputs)
    half = len(embeddings)
    output = unet_edm.make(**tiny, dtype="bfloat16").apply(params, *inputs)
    chex.assert_trees_all_equal(embeddings[:half], embeddings[half:])
    assert output.dtype == jnp.bfloat16
    difference = np.abs(output.astype(jnp.float32) - expected)
    assert difference.max() > 1e-4 and difference.mean() < 2e-2 * np.abs(expected).mean()


def test_remat_changes_no_gradient(tiny, inputs):
    settings = tiny | dict(multipliers=(1,), attention=())
    plain, remat = unet_edm.make(**settings), unet_edm.make(**settings, remat=True)
    params = random_params(plain.abstract)

    def gradient(network):
        return jax.jit(jax.grad(lambda p: jnp.mean(network.apply(p, *inputs) ** 2)))(params)

    assert str(jax.make_jaxpr(remat.apply)(params, *inputs)).count("= remat") == 5  # one per block
    chex.assert_trees_all_close(gradient(remat), gradient(plain), rtol=1e-4, atol=1e-6)


def test_no_label_is_null_label(network, params, inputs):
    x, noise, _ = inputs
    bias = {**params, "map_label": {**params["map_label"], "bias": jnp.zeros(8)}}
    np.testing.assert_array_equal(network.apply(bias, x, noise, np.full(3, 10)), network.apply(bias, x, noise))


def test_initial_parameters(network):
    params = network.init(0)
    chex.assert_trees_all_equal(params, network.init(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, network.abstract)
    block = params["enc"]["4x4_block0"]
    bounds = {"conv0": (9 * 8 + 9 * 16, 1), "conv1": (2 * 9 * 16, 1e-5), "proj": (16 + 16, 1e-5), "qkv": (16 + 48, 0.2**0.5)}
    for name, (fan, gain) in bounds.items():
        bound = gain * np.sqrt(6 / fan)
        assert 0.9 * bound < np.abs(block[name]["kernel"]).max() <= bound, name
        np.testing.assert_array_equal(block[name]["bias"], np.zeros_like(block[name]["bias"]))
    np.testing.assert_array_equal(block["norm0"]["scale"], np.ones(8))


def test_a_size_that_cannot_be_halved():
    with pytest.raises(ValueError, match=r"^size 10 cannot be halved 2 times; use fewer multipliers or another size.$"):
        unet_edm.make(size=10, channels=1, multipliers=(1, 1, 1))
