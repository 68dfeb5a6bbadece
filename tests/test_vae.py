"""Parity with diffusers, and the mistakes that would break it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.models import layers, vae
from dmd_jax.models import lpips as lpips_lib
from tests import test_features
from tests.test_features import nchw
from tests.test_unet_sd import (
    TOLERANCE,
    change_epsilon,
    checksum,
    error,
    interpolate_between_pixels,
    nhwc,
    oracle,
    params_of,
)

torch = pytest.importorskip("torch")

KL = dict(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)
TINY = dict(width=8, num_blocks=1)
MAKE = {
    "kl": lambda **settings: vae.kl(**KL, **settings),
    "tiny": lambda **settings: vae.tiny(**TINY, **settings),
}
SCALE = {"kl": 0.18215, "tiny": 1}


@pytest.fixture(scope="module")
def oracles():
    widths = [TINY["width"]] * 4
    return {
        "kl": oracle(
            "AutoencoderKL",
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            **KL,
        ),
        "tiny": oracle(
            "AutoencoderTiny",
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        ),
    }


@pytest.fixture(scope="module")
def params(oracles):
    return {kind: params_of(module, MAKE[kind]()) for kind, module in oracles.items()}


@pytest.fixture(scope="module")
def inputs():
    """Of each kind: an image of odd size, latents."""
    rng = np.random.default_rng(1)
    shapes = {"kl": ((2, 18, 15, 3), (2, 5, 3, 4)), "tiny": ((2, 19, 26, 3), (2, 2, 3, 4))}
    return {
        kind: (rng.uniform(-1, 1, x).astype(np.float32), rng.standard_normal(z, np.float32))
        for kind, (x, z) in shapes.items()
    }


def both_ways(network, params, x, latents):
    module = network.bind(params)
    return module.encode(x), module.decode(latents)


@pytest.fixture(scope="module")
def outputs(params, inputs):
    return {
        kind: [np.asarray(a) for a in both_ways(MAKE[kind](), params[kind], *inputs[kind])]
        for kind in MAKE
    }


@pytest.mark.parametrize("kind", MAKE)
def test_parity(kind, oracles, inputs, outputs):
    x, latents = (nchw(a) for a in inputs[kind])
    with torch.no_grad():
        encoded = oracles[kind].encode(x)
        expected = (
            encoded.latent_dist.mean if kind == "kl" else encoded.latents,
            oracles[kind].decode(latents / SCALE[kind]).sample,
        )
    assert all(a.dtype == np.float32 for a in outputs[kind])
    assert error(outputs[kind][0], SCALE[kind] * nhwc(expected[0])) < TOLERANCE
    assert error(outputs[kind][1], nhwc(expected[1])) < TOLERANCE


def test_moments(oracles, params, inputs, outputs):
    x = 30 * inputs["kl"][0]
    loud = {
        **params["kl"],
        "quant_conv": jax.tree.map(lambda a: 100 * a, params["kl"]["quant_conv"]),
    }  # so that the clip counts
    with torch.no_grad():
        oracle_moments = oracles["kl"].quant_conv(oracles["kl"].encoder(nchw(x)))
    mean, logvar = MAKE["kl"]().bind(loud).moments(x)
    expected = np.split(nhwc(100 * oracle_moments), 2, axis=-1)
    assert error(mean, expected[0]) < 1e-4
    assert (
        error(logvar, np.clip(expected[1], -30, 20)) < 1e-4
        and logvar.max() == 20
        and logvar.min() == -30
    )


def pad_evenly(monkeypatch):  # trap 2
    monkeypatch.setattr(vae, "PADDING", "SAME")


def the_unets_epsilon(monkeypatch):  # trap 10
    change_epsilon(monkeypatch, layers.GroupNorm, 1e-6, 1e-5)


def forget_the_scale(monkeypatch):
    right = vae.KL.__init__
    monkeypatch.setattr(
        vae.KL,
        "__init__",
        lambda *args, scaling_factor, **settings: right(*args, scaling_factor=1.0, **settings),
    )


def attend_by_columns(monkeypatch):  # trap 21
    right = layers.attention

    def wrong(q, k, v):
        b, n, _, c = q.shape
        return right(q, k, v).reshape(b, 3, n // 3, c).swapaxes(1, 2).reshape(q.shape)

    monkeypatch.setattr(layers, "attention", wrong)


def take_the_variance(monkeypatch):
    right = vae.KL.moments
    monkeypatch.setattr(vae.KL, "moments", lambda self, x: right(self, x)[::-1])


def leave_images_as_they_are(monkeypatch):
    monkeypatch.setattr(vae.Tiny, "encode", lambda self, x: self._chain(self.encoder, x))


def forget_the_tanh(monkeypatch):
    monkeypatch.setattr(
        vae.Tiny, "decode", lambda self, latents: 2 * self._chain(self.decoder, latents) - 1
    )


MISTAKES = {  # the kind, whether it shows in the encoder, and in the decoder
    pad_evenly: ("kl", True, False),
    the_unets_epsilon: ("kl", True, True),
    forget_the_scale: ("kl", True, True),
    attend_by_columns: ("kl", True, True),
    take_the_variance: ("kl", True, False),
    interpolate_between_pixels: ("tiny", False, True),
    leave_images_as_they_are: ("tiny", True, False),
    forget_the_tanh: ("tiny", False, True),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_parity_would_show_mistakes(monkeypatch, params, inputs, outputs, mistake):
    kind, *shows = MISTAKES[mistake]
    mistake(monkeypatch)
    wrong = both_ways(MAKE[kind](), params[kind], *inputs[kind])
    for a, b, should in zip(wrong, outputs[kind], shows, strict=True):
        assert (a.shape != b.shape or error(a, b) > 10 * TOLERANCE) == should


@pytest.mark.parametrize(
    ("make", "num_params", "names"),
    [
        (vae.kl, 83_653_863, "600696bc94ffc80f250f7a2b836e289ff191e5f194ce89f9aa389cfc8ef4a0ab"),
        (vae.tiny, 2_445_063, "30c1cc792be132f4dbb61391ad6254ae0988b0ab7dea8d08c5cef36cd913edeb"),
    ],
    ids=["kl", "tiny"],
)
def test_the_public_checkpoints_parameters(make, num_params, names):
    network = make()
    assert sum(a.size for a in jax.tree.leaves(network.abstract)) == num_params
    assert checksum(network.abstract) == names


def lpips_oracle(params):
    test_features.import_torchvision()
    module = pytest.importorskip("lpips").LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for stage in module.net.children():
        for name, layer in stage.named_children():
            if isinstance(layer, torch.nn.MaxPool2d):
                setattr(stage, name, torch.nn.AvgPool2d(2, 2))
    state = test_features.to_torch(params)
    for name, parameter in module.named_parameters():
        parameter.data = state[
            name if name.startswith("lin") else f"features.{name.split('.', 2)[2]}"
        ]
    return module


def test_lpips_of_decoded_latents_and_its_gradient(oracles, params):
    lpips, rng = lpips_lib.make(size=None), np.random.default_rng(2)
    lpips_params = test_features.random_params(lpips.abstract)
    z, target = (rng.standard_normal((2, 4, 5, 4), np.float32) for _ in range(2))
    torch_z = nchw(z).requires_grad_()
    images = [
        oracles["kl"].decode(latents / SCALE["kl"]).sample for latents in (torch_z, nchw(target))
    ]
    expected = lpips_oracle(lpips_params)(*images)[:, 0, 0, 0]
    expected.sum().backward()

    def total(z, params, lpips_params):
        decode = MAKE["kl"]().apply
        distance = lpips.apply(lpips_params, decode(params, z), decode(params, target))
        return distance.sum(), distance

    gradient, distance = jax.jit(jax.grad(total, has_aux=True))(z, params["kl"], lpips_params)
    assert (
        error(distance, expected.detach()) < TOLERANCE
        and error(gradient, nhwc(torch_z.grad)) < TOLERANCE
    )


@pytest.mark.parametrize("kind", MAKE)
def test_bfloat16_is_close_and_remat_is_the_same(kind, params, inputs, outputs):
    _, latents = inputs[kind]
    half = jax.jit(MAKE[kind](dtype="bfloat16").apply)(params[kind], latents)
    assert half.dtype == jnp.float32 and 1e-4 < error(half, outputs[kind][1]) < 5e-2  # trap 17
    remat = MAKE[kind](remat=True)
    assert (
        str(jax.make_jaxpr(remat.apply)(params[kind], latents)).count("= remat")
        == {"kl": 9, "tiny": 4}[kind]
    )
    assert error(remat.apply(params[kind], latents), outputs[kind][1]) < TOLERANCE


def test_space_to_depth():
    network = vae.space_to_depth(factor=2)
    assert network.abstract == network.init(0) == {}
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    latents = network.bind({}).encode(x)
    np.testing.assert_array_equal(latents[1, 0, 2], x[1, :2, 4:6].reshape(12))
    np.testing.assert_array_equal(network.apply({}, latents), x)
    with pytest.raises(
        ValueError,
        match=r"^images of 4 x 6 are not divisible by factor 4; use another factor or size.$",
    ):
        vae.space_to_depth(factor=4).bind({}).encode(x)


@pytest.mark.parametrize("kind", MAKE)
def test_initial_parameters(kind):
    network = MAKE[kind]()
    chex.assert_trees_all_equal_shapes_and_dtypes(network.init(0), network.abstract)


def test_channels_that_groups_do_not_divide():
    with pytest.raises(
        ValueError,
        match=(
            r"^block_out_channels 100 is not divisible by norm_num_groups 32; change one "
            r"of them.$"
        ),
    ):
        vae.kl(block_out_channels=(64, 100))
