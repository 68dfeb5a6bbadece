import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import generate, samplers, sharding
from dmd_jax import process as process_lib
from dmd_jax.models import layers, quantize, unet_edm, unet_sd

pytest.importorskip("qwix")

EDM = dict(
    size=8, channels=1, num_classes=10, width=16, multipliers=(1, 2), num_blocks=1, attention=(4,)
)
SD = dict(
    block_out_channels=(16, 32),
    layers_per_block=1,
    attention=(True, False),
    num_heads=2,
    cross_attention_dim=24,
    norm_num_groups=8,
)
RNG = np.random.default_rng(0)
EDM_INPUTS = (
    RNG.standard_normal((8, 8, 8, 1), np.float32),
    np.float32(np.linspace(-1, 1, 8)),
    np.arange(8),
)
SD_INPUTS = tuple(
    np.float32(a)
    for a in (
        RNG.standard_normal((8, 8, 8, 4)),
        np.linspace(0, 999, 8),
        RNG.standard_normal((8, 7, 24)),
    )
)
CASES = {
    "ddpmpp": (unet_edm.ddpmpp, EDM, EDM_INPUTS),
    "ncsnpp": (unet_edm.ncsnpp, EDM, EDM_INPUTS),
    "sd": (unet_sd.unet, SD, SD_INPUTS),
    "sd in bfloat16 with remat": (unet_sd.unet, SD | dict(dtype="bfloat16", remat=True), SD_INPUTS),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A network, parameters of it, its inputs, and its function and parameters in eight bits."""
    make, settings, inputs = CASES[request.param]
    network = make(**settings)
    params = stirred(network.init(0))
    apply, quantized = quantize.int8(network, params, inputs)
    return network, params, inputs, jax.jit(apply), quantized


def stirred(params):
    """No layer is left at zero."""
    rng = np.random.default_rng(1)
    scale = lambda a: 0.3 / np.sqrt(np.prod(a.shape[:-1])) if a.ndim > 1 else 0.1
    return jax.tree.map(lambda a: a + np.float32(scale(a) * rng.standard_normal(a.shape)), params)


def num_bytes(tree):
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def relative(x, y):
    return float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)))


def test_output_is_close_to_that_in_float(case):
    """Measured: 2.0, 1.6, 1.8 and 2.1 %."""
    network, params, inputs, apply, quantized = case
    error = relative(apply(quantized, *inputs), jax.jit(network.apply)(params, *inputs))
    assert 0.004 < error < 0.03


def test_kernels_are_rounded_by_channel_and_the_rest_is_left(case):
    _, params, _, _, quantized = case
    quantized, floats = traverse_util.flatten_dict(quantized, sep="/"), []
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        if path in quantized:
            np.testing.assert_array_equal(quantized.pop(path), value)
            floats += [path.removesuffix("/kernel")] * path.endswith("/kernel")
            continue
        scale = np.abs(value).max(axis=tuple(range(value.ndim - 1)), keepdims=True) / 127.5
        np.testing.assert_allclose(quantized.pop(f"{path}/array/scale"), scale, rtol=1e-6)
        found = quantized.pop(f"{path}/array/qvalue")
        assert found.dtype == jnp.int8
        np.testing.assert_allclose(found, np.minimum(value / scale, 127), atol=0.5001)
    assert not quantized
    edm = {"8x8_conv", "8x8_aux_conv", "map_label", "map_layer0", "map_layer1", "affine"}
    if "map_noise" in params:  # NCSN++
        edm |= {"4x4_aux_residual"}
    sd = {"conv_in", "conv_out", "linear_1", "linear_2", "time_emb_proj"}
    assert {path.split("/")[-1] for path in floats} == (edm if "enc" in params else sd)


def test_convolutions_and_linear_layers_are_of_integers_and_attention_is_not(case):
    _, params, inputs, apply, quantized = case
    program = apply.lower(quantized, *inputs).as_text().splitlines()
    kernels = traverse_util.flatten_dict(params, sep="/")
    kernels = {
        path: a.ndim
        for path, a in kernels.items()
        if path.endswith("kernel") and f"{path}/array/qvalue" in flat(quantized)
    }
    for operation, ndim in (("convolution", 4), ("dot_general", 2)):
        lines = [line for line in program if f"stablehlo.{operation}" in line]
        wanted = sum(n == ndim for n in kernels.values())
        integers = sum(re.search(r"xi8>.*xi8>.*xi32>", line) is not None for line in lines)
        assert integers == wanted < len(lines)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def test_images_do_not_share_a_scale(case):
    """With a common scale, images a thousand times as large would leave nothing of the first one.

    The bound is that of the rounding itself.
    """
    _, _, (x, *inputs), apply, quantized = case
    large = np.concatenate([x[:1], 1000 * x[1:]])
    both = [np.asarray(apply(quantized, a, *inputs))[0] for a in (x, large)]
    assert relative(*both) < 0.02


def test_on_eight_devices_in_a_sampler():
    network, (z, _, cond) = unet_edm.ddpmpp(**EDM), EDM_INPUTS
    params, process = stirred(network.init(0)), process_lib.RectifiedFlow()
    denoise = denoiser_lib.Denoiser(network.apply, process, denoiser_lib.flow)
    apply, quantized = quantize.int8(network, params, (z[:1], np.ones(1, np.float32), cond[:1]))
    inputs = dict(z=z, key=np.zeros((8, 2), np.uint32), cond=cond)
    images = []
    for network, weights, devices in (
        (denoise.network, params, 8),
        (apply, quantized, 8),
        (apply, quantized, 1),
    ):
        sampler = samplers.one_step(dataclasses.replace(denoise, network=network), process)
        parallel = sharding.Parallel(sharding.make_mesh(devices=jax.devices()[:devices]))
        images.append(generate.make_sample(sampler, parallel, 8)(weights, inputs))
    assert relative(images[1], images[0]) < 0.03 and relative(images[1], images[2]) < 0.03


def test_stable_diffusion_takes_a_quarter():
    """It takes 946 MB instead of 3438.

    Those are 860 million bytes, and the 28 million parameters of the time embeddings in float32.
    """
    network = unet_sd.unet()
    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 64, 64, 4), (1,), (1, 77, 768))
    ]
    quantized = jax.eval_shape(
        lambda params: quantize.int8(network, params, inputs)[1], network.abstract
    )
    assert num_bytes(quantized) == pytest.approx(0.275 * num_bytes(network.abstract), rel=0.01)


class Three(nnx.Module):
    def __init__(self, rngs):
        self.conv_in, self.conv, self.conv_out = (
            nnx.Conv(2, 2, (k, k), rngs=rngs) for k in (1, 3, 1)
        )
        self.time_embedding = nnx.Dict(linear_1=nnx.Linear(1, 2, rngs=rngs))
        self.linear = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x, noise):
        emb = self.time_embedding.linear_1(noise[:, None])[:, None, None]
        return self.conv_out(self.linear(self.conv(self.conv_in(x) + emb)))


def test_one_convolution_and_one_linear_layer_in_numpy():
    """All positive: -127.5 would be rounded to -128 or to -127 with the last bit of the scale."""
    network = layers.functional(
        Three,
        ((".", lambda rng, shape: rng.uniform(0, 1, shape)),),
        ("conv_in", "conv_out", "time_embedding"),
    )
    params, x = network.init(0), np.float32(RNG.uniform(0, 1, (3, 5, 5, 2)))
    noise = np.float32([1, 2, 3])
    apply, quantized = quantize.int8(network, params, (x, noise))

    def rounded(a, axes):
        scale = np.abs(a).max(axis=axes, keepdims=True) / 127.5
        return np.clip(np.round(a / scale), -128, 127) * scale

    def kernel_and_bias(layer):
        return layer["kernel"].astype(float), layer["bias"]

    (w_in, b_in), (w, b), (w_out, b_out) = (
        kernel_and_bias(params[name]) for name in ("conv_in", "conv", "conv_out")
    )
    (w_emb, b_emb), (w_lin, b_lin) = (
        kernel_and_bias(a) for a in (params["time_embedding"]["linear_1"], params["linear"])
    )
    h = x @ w_in[0, 0] + b_in + (noise[:, None] @ w_emb + b_emb)[:, None, None]
    h, w = np.pad(rounded(h, (1, 2, 3)), ((0, 0), (1, 1), (1, 1), (0, 0))), rounded(w, (0, 1, 2))
    h = sum(h[:, i : i + 5, j : j + 5] @ w[i, j] for i in range(3) for j in range(3)) + b
    h = rounded(h, 3) @ rounded(w_lin, 0) + b_lin
    np.testing.assert_allclose(apply(quantized, x, noise), h @ w_out[0, 0] + b_out, rtol=1e-5)


def test_networks_that_do_not_fit():
    for float_layers, message in (
        ((), "the network does not say which of its layers stay in float"),
        (("conv",), r"layers that stay in float, of which the network has none: \['conv'\]"),
    ):
        network = layers.functional(
            lambda rngs: nnx.Linear(2, 2, rngs=rngs), ((".", layers.zeros),), float_layers
        )
        with pytest.raises(ValueError, match=message):
            quantize.int8(network, network.init(0), (np.ones((1, 2)),))
    network = unet_edm.adm(**EDM)  # too narrow for a head of attention
    with pytest.raises(
        ValueError, match=r"layers that were not called with these inputs.*4x4_block0/proj"
    ):
        quantize.int8(network, network.init(0), EDM_INPUTS)


def test_without_qwix(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(
        ValueError, match=r"eight bits need the package qwix; pip install 'dmd_jax\[quantize\]'"
    ):
        quantize.int8(None, {}, ())
