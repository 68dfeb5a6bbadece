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
from dmd_jax.weights import state_dict

GOLDEN = pathlib.Path(__file__).parent / "data" / "edm_golden.npz"
TOLERANCE = 1e-4  # of the parity test


def random_params(abstract):
    """The golden file's parameters: a random generator per name."""

    def draw(name, a):
        w = np.random.RandomState(
            zlib.crc32(f"model.{name}".encode()) & 0x7FFFFFFF
        ).standard_normal(a.shape)
        if name.endswith(".freqs"):
            w *= 16
        elif a.ndim >= 2:
            w /= np.sqrt(np.prod(a.shape[1:]))
        elif name.endswith(".bias"):
            w *= 0.1
        else:
            w = 1 + 0.1 * w
        return w.astype(np.float32)

    shapes = state_dict.to_torch(jax.tree.map(lambda a: np.empty(a.shape, np.float32), abstract))
    return state_dict.from_torch({name: draw(name, a) for name, a in shapes.items()}, abstract)


@pytest.fixture(scope="module")
def params(network):
    return random_params(network.abstract)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((3, 8, 8, 1), dtype=np.float32),
        np.float32([-0.3, 0.5, 1.1]),
        np.int32([1, 3, 7]),
    )


FFHQ = dict(size=64, channels=3, multipliers=(1, 2, 2, 2), augment_dim=9)
NETWORKS = {  # all nine public checkpoints: network, parameters
    "edm-cifar10-32x32-uncond-vp": (
        unet_edm.ddpmpp,
        dict(size=32, channels=3, augment_dim=9),
        55_733_891,
    ),
    "edm-cifar10-32x32-cond-vp": (
        unet_edm.ddpmpp,
        dict(size=32, channels=3, num_classes=10, augment_dim=9),
        55_735_299,
    ),
    "edm-cifar10-32x32-uncond-ve": (
        unet_edm.ncsnpp,
        dict(size=32, channels=3, augment_dim=9),
        56_397_827,
    ),
    "edm-cifar10-32x32-cond-ve": (
        unet_edm.ncsnpp,
        dict(size=32, channels=3, num_classes=10, augment_dim=9),
        56_400_643,
    ),
    "edm-ffhq-64x64-uncond-vp": (unet_edm.ddpmpp, FFHQ, 61_805_571),
    "edm-ffhq-64x64-uncond-ve": (unet_edm.ncsnpp, FFHQ, 62_761_091),
    "edm-afhqv2-64x64-uncond-vp": (unet_edm.ddpmpp, FFHQ, 61_805_571),
    "edm-afhqv2-64x64-uncond-ve": (unet_edm.ncsnpp, FFHQ, 62_761_091),
    "edm-imagenet-64x64-cond-adm": (
        unet_edm.adm,
        dict(size=64, channels=3, num_classes=1000),
        295_899_267,
    ),
}
GOLDENS = {
    "cifar10_uncond_vp": "edm-cifar10-32x32-uncond-vp",
    "cifar10_cond_vp": "edm-cifar10-32x32-cond-vp",
    "cifar10_cond_ve": "edm-cifar10-32x32-cond-ve",
    "ffhq64_vp": "edm-ffhq-64x64-uncond-vp",
    "imagenet64_adm": "edm-imagenet-64x64-cond-adm",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_public_checkpoints_parameters(name):
    make, settings, num_params = NETWORKS[name]
    abstract = make(**settings).abstract
    freqs = abstract.get("map_noise", {}).get("freqs", np.zeros(0))  # not a parameter there
    assert sum(a.size for a in jax.tree.leaves(abstract)) - freqs.size == num_params


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_parity(name):
    make, settings, _ = NETWORKS[GOLDENS[name]]
    network, size, golden = make(**settings), settings["size"], np.load(GOLDEN)
    rng = np.random.RandomState(2024)
    y, noise = (rng.standard_normal((3, 3, size, size)) for _ in range(2))
    sigma = np.float32([0.3, 7, 80])
    x = np.clip(0.5 * y, -1, 1).astype(np.float32) + sigma.reshape(3, 1, 1, 1) * noise.astype(
        np.float32
    )

    expected, labels = golden[f"{name}/D"], None
    if "num_classes" in settings:  # a fourth image: the first without its label
        expected = np.concatenate([expected, golden[f"{name}/D_zero_label"][:1]])
        x, sigma, labels = (
            np.concatenate([x, x[:1]]),
            np.append(sigma, sigma[:1]),
            np.int32([1, 3, 7, settings["num_classes"]]),
        )

    def x_hat_and_bottleneck(params, x, sigma, labels):
        module, (_, _, in_, noise) = network.bind(params), denoiser.edm(process.EDM(), sigma)
        bottleneck, _ = module.encode(process.expand(in_, x) * x, module.embed(noise, labels))
        return denoiser.Denoiser(network.apply, process.EDM())(params, x, sigma, labels), bottleneck

    x_hat, bottleneck = jax.jit(x_hat_and_bottleneck)(
        random_params(network.abstract), x.transpose(0, 2, 3, 1), sigma, labels
    )
    np.testing.assert_allclose(x_hat.transpose(0, 3, 1, 2), expected, rtol=0, atol=TOLERANCE)
    if f"{name}/bottleneck" in golden:
        np.testing.assert_allclose(
            bottleneck[:3].transpose(0, 3, 1, 2),
            golden[f"{name}/bottleneck"],
            rtol=0,
            atol=TOLERANCE,
        )


FAMILIES = {"ddpmpp": unet_edm.ddpmpp, "ncsnpp": unet_edm.ncsnpp, "adm": unet_edm.adm}


def small(family, **settings):
    """A network with one of everything."""
    return FAMILIES[family](
        size=8,
        channels=1,
        num_classes=10,
        width=64 if family == "adm" else 16,
        multipliers=(1, 2),
        num_blocks=1,
        attention=(4,),
        **settings,
    )


def swap_sin_and_cos(monkeypatch):  # trap 1
    right = layers.cos_sin
    monkeypatch.setattr(
        layers, "cos_sin", lambda t, freqs: jnp.roll(right(t, freqs), len(freqs), axis=-1)
    )


def the_other_endpoint(monkeypatch):  # trap 2
    right = layers.positional_frequencies
    monkeypatch.setattr(
        layers, "positional_frequencies", lambda n, *, endpoint: right(n, endpoint=not endpoint)
    )


def keep_q_k_and_v_apart(monkeypatch):  # trap 3
    right = unet_edm.Block._attention

    def wrong(self, qkv):
        return right(self, jnp.stack(jnp.split(qkv, 3, axis=-1), axis=-1).reshape(qkv.shape))

    monkeypatch.setattr(unet_edm.Block, "_attention", wrong)


def convolve_before_resampling(monkeypatch):  # trap 5
    right = unet_edm.Block.__call__

    def wrong(self, x, emb):
        if not self.resample:
            return right(self, x, emb)
        h = self.resample(self.conv0(nnx.silu(self.norm0(x))))
        h = self.conv1(nnx.silu(self._modulate(h, self.affine(emb)[:, None, None])))
        return (
            (self.skip if hasattr(self, "skip") else jnp.array)(self.resample(x)) + h
        ) * self.family.skip_scale

    monkeypatch.setattr(unet_edm.Block, "__call__", wrong)


def encode_wrongly(monkeypatch, add_input):
    def encode(self, x, emb):
        skips, image = [], x
        for name in self.enc_names:
            if name.endswith("_aux_residual"):
                x = image = add_input(self.enc[name], x, image, skips)
            else:
                x = self.enc[name](x) if name.endswith("_conv") else self.enc[name](x, emb)
                skips.append(x)
        return x, skips

    monkeypatch.setattr(unet_edm.UNet, "encode", encode)


def resample_the_input_before_its_convolution(monkeypatch):  # trap 5
    def add_input(conv, x, image, skips):
        skips[-1] = (
            x + conv(layers.downsample(layers.smooth(image)))[:, 1:-1, 1:-1]
        ) * unet_edm.SQRT_HALF
        return skips[-1]

    encode_wrongly(monkeypatch, add_input)


def keep_the_skip(monkeypatch):  # trap 10
    def add_input(conv, x, image, skips):
        return (x + layers.downsample(layers.smooth(conv(image), padding=0))) * unet_edm.SQRT_HALF

    encode_wrongly(monkeypatch, add_input)


def scale_attention_once_more_or_less(monkeypatch):  # trap 6
    right = unet_edm.Block.__call__
    monkeypatch.setattr(
        unet_edm.Block,
        "__call__",
        lambda self, x, emb: right(self, x, emb) * (2**0.5 if self.heads else 1),
    )


def the_other_label_scale(monkeypatch):  # trap 7
    right = jax.nn.one_hot
    monkeypatch.setattr(
        jax.nn, "one_hot", lambda label, n, dtype: right(label, n, dtype=dtype) * n**-0.5
    )


def shift_before_scale(monkeypatch):  # trap 8
    right = jnp.split
    monkeypatch.setattr(jnp, "split", lambda a, n, axis: right(a, n, axis=axis)[::-1])


def forget_the_one(monkeypatch):  # trap 8
    right = unet_edm.Block._modulate
    monkeypatch.setattr(
        unet_edm.Block, "_modulate", lambda self, h, emb: right(self, h, emb) - self.norm1(h)
    )


def embed_after_the_norm(monkeypatch):  # trap 8
    monkeypatch.setattr(unet_edm.Block, "_modulate", lambda self, h, emb: self.norm1(h) + emb)


def leave_the_sum_unscaled(monkeypatch):  # trap 10
    monkeypatch.setattr(unet_edm, "SQRT_HALF", 1.0)


MISTAKES = {
    swap_sin_and_cos: ("ddpmpp", "ncsnpp", "adm"),
    the_other_endpoint: ("ddpmpp", "adm"),
    keep_q_k_and_v_apart: ("ddpmpp", "adm"),
    convolve_before_resampling: ("ncsnpp", "adm"),
    resample_the_input_before_its_convolution: ("ncsnpp",),
    scale_attention_once_more_or_less: ("ddpmpp", "adm"),
    the_other_label_scale: ("ddpmpp", "adm"),
    shift_before_scale: ("adm",),
    forget_the_one: ("adm",),
    embed_after_the_norm: ("ddpmpp",),
    keep_the_skip: ("ncsnpp",),
    leave_the_sum_unscaled: ("ncsnpp",),
}


@pytest.fixture(scope="module")
def outputs(inputs):
    """Of each family: parameters and what they make of the inputs."""
    params = {family: random_params(small(family).abstract) for family in FAMILIES}
    return {
        family: (params[family], small(family).apply(params[family], *inputs))
        for family in FAMILIES
    }


@pytest.mark.parametrize(
    ("mistake", "family"), [(m, f) for m, families in MISTAKES.items() for f in families]
)
def test_parity_would_show_mistakes(monkeypatch, inputs, outputs, mistake, family):
    params, expected = outputs[family]
    mistake(monkeypatch)
    assert np.abs(small(family).apply(params, *inputs) - expected).max() > 10 * TOLERANCE


def test_group_norm_on_a_nearly_constant_map():
    rng = np.random.default_rng(0)
    x = (5 + 1e-3 * rng.standard_normal((2, 8, 8, 16))).astype(np.float32)
    norm = unet_edm._group_norm(16, family=unet_edm.DDPMPP, dtype=jnp.float32)  # 4 groups
    norm.scale[...], norm.bias[...] = (
        jnp.asarray(rng.standard_normal(16), jnp.float32) for _ in range(2)
    )
    groups = x.astype(np.float64).reshape(2, 64, 4, 4)
    mean, variance = groups.mean(axis=(1, 3), keepdims=True), groups.var(axis=(1, 3), keepdims=True)
    scale, bias = np.asarray(norm.scale[...]), np.asarray(norm.bias[...])
    expected = {
        eps: ((groups - mean) / np.sqrt(variance + eps)).reshape(x.shape) * scale + bias
        for eps in (1e-6, 1e-5)
    }
    np.testing.assert_allclose(norm(x), expected[1e-6], atol=2e-3)
    assert np.abs(norm(x) - expected[1e-5]).max() > 0.1  # the epsilon of PyTorch and of ADM


def test_positional_embedding_goldens():
    goldens = {  # cosines, then sines
        True: [0.457596, 0.998707, 0.999997, 1.0, 0.889160, 0.0508271, 0.00236020, 1.09551e-4],
        False: [0.457596, 0.994005, 0.999940, 0.999999, 0.889160, 0.109332, 0.0109549, 0.00109551],
    }
    for endpoint, golden in goldens.items():
        embedding = layers.cos_sin(
            np.log(np.float32([80])) / 4, layers.positional_frequencies(4, endpoint=endpoint)
        )
        np.testing.assert_allclose(embedding[0], golden, atol=2e-6)


def test_bfloat16_is_close_and_its_embedding_is_float32(monkeypatch, tiny, params, inputs):
    embeddings = []

    def run(block, x, emb):
        embeddings.append(emb)
        return block(x, emb)

    monkeypatch.setattr(layers, "_run", run)
    expected = unet_edm.ddpmpp(**tiny).apply(params, *inputs)
    half = len(embeddings)
    output = unet_edm.ddpmpp(**tiny, dtype="bfloat16").apply(params, *inputs)
    chex.assert_trees_all_equal(embeddings[:half], embeddings[half:])
    assert output.dtype == jnp.bfloat16
    difference = np.abs(output.astype(jnp.float32) - expected)
    assert difference.max() > 1e-4 and difference.mean() < 2e-2 * np.abs(expected).mean()


def program(network, inputs):
    return str(jax.make_jaxpr(network.apply)(network.abstract, *inputs))


def test_remat_is_block_by_block(tiny, inputs):
    network = unet_edm.ddpmpp(**tiny | dict(multipliers=(1,), attention=()), remat=True)
    assert program(network, inputs).count("= remat") == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy_of_remat_has_its_own_program(inputs, family):
    policies = (False, True, *layers.POLICIES)
    assert len({program(small(family, remat=remat), inputs) for remat in policies}) == len(policies)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_policy_of_remat_is_refused(family):
    with pytest.raises(ValueError, match=r"^no remat policy 'dots'; use True, False or one of "):
        small(family, remat="dots")


@pytest.mark.parametrize("remat", [True, *layers.POLICIES])
def test_remat_changes_no_gradient(tiny, inputs, remat):
    settings = tiny | dict(multipliers=(1,), attention=())
    params = random_params(unet_edm.ddpmpp(**settings).abstract)

    def gradient(remat):
        network = unet_edm.ddpmpp(**settings, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.mean(network.apply(p, *inputs) ** 2)))(params)

    chex.assert_trees_all_close(gradient(remat), gradient(False), rtol=1e-4, atol=1e-6)


def test_no_label_is_null_label(network, params, inputs):
    x, noise, _ = inputs
    bias = {**params, "map_label": {**params["map_label"], "bias": jnp.zeros(8)}}
    np.testing.assert_array_equal(
        network.apply(bias, x, noise, np.full(3, 10)), network.apply(bias, x, noise)
    )


def test_initial_parameters(network):
    params = network.init(0)
    chex.assert_trees_all_equal(params, network.init(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, network.abstract)
    block = params["enc"]["4x4_block0"]
    bounds = {
        "conv0": (9 * 8 + 9 * 16, 1),
        "conv1": (2 * 9 * 16, 1e-5),
        "proj": (16 + 16, 1e-5),
        "qkv": (16 + 48, 0.2**0.5),
    }
    for name, (fan, gain) in bounds.items():
        bound = gain * np.sqrt(6 / fan)
        assert 0.9 * bound < np.abs(block[name]["kernel"]).max() <= bound, name
        np.testing.assert_array_equal(block[name]["bias"], np.zeros_like(block[name]["bias"]))
    np.testing.assert_array_equal(block["norm0"]["scale"], np.ones(8))


def test_a_size_that_cannot_be_halved():
    with pytest.raises(
        ValueError,
        match=r"^size 10 cannot be halved 2 times; use fewer multipliers or another size.$",
    ):
        unet_edm.ddpmpp(size=10, channels=1, multipliers=(1, 1, 1))
