"""Parity with diffusers, and the mistakes that would break it."""

import functools
import hashlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from dmd_jax.models import layers, unet_sd
from dmd_jax.weights import state_dict
from tests import test_features

torch = pytest.importorskip("torch")
TOLERANCE = 1e-5  # of the largest output, for parity with PyTorch


def oracle(name, **config):
    """Returns a module of diffusers.

    No parameter is as in a fresh network, and signals are small, so that the epsilons of norms
    matter.
    """
    test_features.import_torchvision()  # diffusers does, too
    module = getattr(pytest.importorskip("diffusers"), name)(**config).eval()
    return randomize(module, r"(conv_in|conv2|proj_in)\.")


def randomize(module, quiet):
    """Draws all parameters of a module; those whose names match `quiet` are small."""
    rng = np.random.default_rng(0)
    for name, parameter in module.named_parameters():
        draw = rng.standard_normal(parameter.shape)
        if parameter.ndim > 1:
            draw /= np.sqrt(np.prod(parameter.shape[1:]))
        else:
            draw = 0.1 * draw if name.endswith("bias") else 1 + 0.2 * draw
        parameter.data = torch.from_numpy(
            np.float32(draw * 0.03 if re.search(quiet, name) else draw)
        )
    return module


def params_of(module, network):
    return state_dict.from_torch(
        {name: tensor.numpy() for name, tensor in module.state_dict().items()}, network.abstract
    )


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def error(a, b):
    """Relative to the largest output."""
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


def checksum(abstract):
    """Of the sorted names and shapes of a checkpoint."""
    tensors = state_dict.to_torch(
        jax.tree.map(lambda a: np.broadcast_to(np.float32(0), a.shape), abstract)
    )
    return hashlib.sha256(
        "\n".join(sorted(f"{name} {a.shape}" for name, a in tensors.items())).encode()
    ).hexdigest()


SETTINGS = {
    "sd1": dict(
        block_out_channels=(16, 32, 32),
        attention=(True, True, False),
        num_heads=4,
        layers_per_block=1,
    ),
    "sd2": dict(
        block_out_channels=(16, 32, 32),
        attention=(True, False, True),
        num_heads=(2, 4, 8),
        use_linear_projection=True,
    ),
}
SHAPES = {"sd1": (2, 7, 9, 4), "sd2": (2, 10, 6, 4)}


def make(kind, **settings):
    return unet_sd.unet(cross_attention_dim=24, norm_num_groups=8, **SETTINGS[kind], **settings)


def diffusers_unet(
    *, block_out_channels, attention, num_heads, layers_per_block=2, use_linear_projection=False
):
    return oracle(
        "UNet2DConditionModel",
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        attention_head_dim=num_heads,
        use_linear_projection=use_linear_projection,
        cross_attention_dim=24,
        norm_num_groups=8,
    )


@pytest.fixture(scope="module")
def inputs():
    """Of each kind: x, labels, cond."""
    rng, noise = np.random.default_rng(1), np.float32([999, 437.5])
    return {
        kind: (
            rng.standard_normal(s, np.float32),
            noise,
            rng.standard_normal((2, 5, 24), np.float32),
        )
        for kind, s in SHAPES.items()
    }


@pytest.fixture(scope="module")
def oracles():
    return {kind: diffusers_unet(**settings) for kind, settings in SETTINGS.items()}


@pytest.fixture(scope="module")
def params(oracles):
    return {kind: params_of(module, make(kind)) for kind, module in oracles.items()}


@pytest.fixture(scope="module")
def output(params, inputs):
    return np.asarray(make("sd1").apply(params["sd1"], *inputs["sd1"]))


@pytest.mark.parametrize("kind", SETTINGS)
def test_parity(kind, oracles, params, inputs, output):
    x, noise, cond = inputs[kind]
    with torch.no_grad():
        expected = oracles[kind](
            test_features.nchw(x), torch.from_numpy(noise), torch.from_numpy(cond)
        ).sample
    result = output if kind == "sd1" else jax.jit(make(kind).apply)(params[kind], x, noise, cond)
    assert error(result, nhwc(expected)) < TOLERANCE


def pad_as_xla_does(monkeypatch):  # trap 1
    monkeypatch.setattr(unet_sd, "PADDING", "SAME")


def attend(monkeypatch, wrong):
    right = layers.attention
    monkeypatch.setattr(layers, "attention", lambda q, k, v: wrong(right, q, k, v))


def take_heads_for_their_width(monkeypatch):  # trap 3
    def wrong(right, *qkv):
        return right(*(a.reshape(*a.shape[:2], a.shape[3], a.shape[2]) for a in qkv))

    attend(monkeypatch, wrong)


def mask_the_padding(monkeypatch):  # trap 13
    attend(
        monkeypatch,
        lambda right, q, k, v: right(q, k[:, :3], v[:, :3]) if k.shape[1] == 5 else right(q, k, v),
    )


def swap_sin_and_cos(monkeypatch):  # trap 4
    right = layers.cos_sin
    monkeypatch.setattr(
        layers, "cos_sin", lambda t, freqs: jnp.roll(right(t, freqs), len(freqs), axis=-1)
    )


def shift_the_frequencies(monkeypatch):  # trap 4
    right = layers.positional_frequencies
    monkeypatch.setattr(
        layers, "positional_frequencies", lambda n, *, endpoint: right(n, endpoint=True)
    )


def round_the_label(monkeypatch):  # trap 5
    right = layers.cos_sin
    monkeypatch.setattr(layers, "cos_sin", lambda t, freqs: right(t.astype(jnp.bfloat16), freqs))


def approximate_gelu(monkeypatch):  # trap 7
    monkeypatch.setattr(layers, "gelu", jax.nn.gelu)


def swap_value_and_gate(monkeypatch):  # trap 8
    right = jnp.split
    monkeypatch.setattr(jnp, "split", lambda a, n, axis: right(a, n, axis=axis)[::-1])


def change_epsilon(monkeypatch, where, of, to):
    right = where.__init__
    monkeypatch.setattr(
        where,
        "__init__",
        lambda *args, epsilon, **kw: right(*args, epsilon=to if epsilon == of else epsilon, **kw),
    )


def one_epsilon(monkeypatch):  # trap 10
    change_epsilon(monkeypatch, layers.GroupNorm, 1e-6, 1e-5)


def the_autoencoders_epsilon(monkeypatch):  # trap 10
    change_epsilon(monkeypatch, layers.GroupNorm, 1e-5, 1e-6)


def flaxs_epsilon(monkeypatch):  # trap 10
    change_epsilon(monkeypatch, nnx.LayerNorm, 1e-5, 1e-6)


def interpolate_between_pixels(monkeypatch):  # trap 19
    def upsample(x):
        b, h, w, c = x.shape
        return jax.image.resize(x, (b, 2 * h, 2 * w, c), "bilinear")

    monkeypatch.setattr(layers, "upsample", upsample)


def skip_before_hidden(monkeypatch):  # trap 20
    right = jnp.concatenate
    monkeypatch.setattr(
        jnp,
        "concatenate",
        lambda arrays, axis: right(arrays[:: -1 if arrays[0].ndim == 4 else 1], axis=axis),
    )


def flatten_by_columns(monkeypatch):  # trap 21
    def wrong(self, x, cond):
        b, h, w, c = x.shape
        tokens = self.proj_in(self.norm(x)).swapaxes(1, 2).reshape(b, h * w, c)
        return x + self.proj_out(self.transformer_blocks["0"](tokens, cond).reshape(b, h, w, c))

    monkeypatch.setattr(unet_sd.Transformer, "__call__", wrong)


MISTAKES = (
    pad_as_xla_does,
    take_heads_for_their_width,
    mask_the_padding,
    swap_sin_and_cos,
    shift_the_frequencies,
    round_the_label,
    approximate_gelu,
    swap_value_and_gate,
    one_epsilon,
    the_autoencoders_epsilon,
    flaxs_epsilon,
    interpolate_between_pixels,
    skip_before_hidden,
    flatten_by_columns,
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_parity_would_show_mistakes(monkeypatch, params, inputs, output, mistake):
    mistake(monkeypatch)
    moved = error(make("sd1").apply(params["sd1"], *inputs["sd1"]), output)
    assert moved > 10 * TOLERANCE


def stacked(kind, n):
    """Returns UNets of diffusers in series, with different weights in each.

    Only the first one's and the last one's outer layers are left.
    """
    units = [diffusers_unet(**SETTINGS[kind]) for _ in range(n)]
    for i, unit in enumerate(units):
        for parameter in unit.parameters():
            parameter.data = parameter.data.roll(i)
        if i > 0:
            unit.conv_in = torch.nn.Identity()
        if i < n - 1:
            unit.conv_norm_out = unit.conv_act = unit.conv_out = torch.nn.Identity()
    return torch.nn.ModuleDict({"units": torch.nn.ModuleList(units)})


@pytest.mark.parametrize(("kind", "n"), [("sd1", 2), ("sd2", 3)])
def test_parity_of_a_stack(kind, n, inputs):
    oracle, network, (x, noise, cond) = stacked(kind, n), make(kind, stack=n), inputs[kind]
    params, expected = params_of(oracle, network), test_features.nchw(x)
    with torch.no_grad():
        for unit in oracle["units"]:
            expected = unit(expected, torch.from_numpy(noise), torch.from_numpy(cond)).sample
    apply = jax.jit(network.apply)
    assert error(apply(params, x, noise, cond), nhwc(expected)) < TOLERANCE
    units, blocks = params["units"], ("down_blocks", "mid_block", "up_blocks")
    swapped = (
        units["0"] | {name: units["1"][name] for name in blocks},
        units["1"] | {name: units["0"][name] for name in blocks},
    )
    labels = [units[i] | {"time_embedding": units["0"]["time_embedding"]} for i in ("0", "1")]
    for wrong in (swapped, labels):
        moved = apply({"units": units | dict(zip(("0", "1"), wrong, strict=True))}, x, noise, cond)
        assert error(moved, nhwc(expected)) > 10 * TOLERANCE


def test_a_stack_grows_from_one_unet(params):
    network, one = make("sd1", stack=3), params["sd1"]
    grown = network.grow(one)
    chex.assert_trees_all_equal_shapes_and_dtypes(grown, network.abstract)
    lacking = [
        ("conv_norm_out", "conv_out"),
        ("conv_in", "conv_norm_out", "conv_out"),
        ("conv_in",),
    ]
    for unit, names in zip(grown["units"].values(), lacking, strict=True):
        chex.assert_trees_all_equal(
            unit, {name: part for name, part in one.items() if name not in names}
        )
    assert make("sd1").grow is None

    other = {name: part for name, part in one.items() if name != "mid_block"} | {
        "new": one["conv_in"],
        "conv_out": one["conv_in"],
    }
    for wrong, problems in (
        (
            other,
            (
                r"missing mid_block\.resnets",
                r"unused new\.kernel",
                r"conv_out\.bias has shape \(16,\), expected \(4,\)",
            ),
        ),
        (grown, (r"missing conv_in\.kernel", r"unused units\.0\.conv_in\.kernel")),
    ):
        for problem in problems:
            with pytest.raises(
                ValueError, match=f"^a stack of UNets grows from the parameters of one .*{problem}"
            ):
                network.grow(wrong)


def test_parameters_of_instaflows_stack():
    network, one = unet_sd.unet(stack=2), unet_sd.unet()
    assert sum(a.size for a in jax.tree.leaves(network.abstract)) == 1_719_017_924
    chex.assert_trees_all_equal(network.grow(one.abstract), network.abstract)


@pytest.fixture(scope="module")
def full():
    return unet_sd.unet()


def test_the_public_checkpoints_parameters(full):
    assert sum(a.size for a in jax.tree.leaves(full.abstract)) == 859_520_964
    assert (
        checksum(full.abstract)
        == "5159ace1d6e60acb2ff7b9ddd73044e92771c04623d5c12ebfaaf0067d0aabb7"
    )


def test_norms_and_heads_of_the_public_checkpoint(full):
    modules = [module for _, module in nnx.iter_modules(full.bind(full.abstract))]
    group_norms = [module.epsilon for module in modules if isinstance(module, layers.GroupNorm)]
    layer_norms = [
        (module.epsilon, module.use_fast_variance)
        for module in modules
        if isinstance(module, nnx.LayerNorm)
    ]
    heads = [
        module.to_q.out_features // module.heads
        for module in modules
        if isinstance(module, unet_sd.Attention)
    ]
    assert (group_norms.count(1e-5), group_norms.count(1e-6), len(group_norms)) == (45, 16, 61)
    assert layer_norms == [(1e-5, False)] * 48
    assert {width: heads.count(width) for width in heads} == {40: 10, 80: 10, 160: 12}


def test_labels_are_embedded_in_float32():
    labels = np.float32([0, 1, 437.5, 999, 1000])
    angles = labels[:, None] * np.exp(-np.log(10000) * np.arange(160) / 160)[None]
    embedding = layers.cos_sin(labels, layers.positional_frequencies(160, endpoint=False))
    np.testing.assert_allclose(
        embedding, np.concatenate([np.cos(angles), np.sin(angles)], axis=-1), atol=1e-4
    )


ONE_LEVEL = dict(
    block_out_channels=(16,),
    attention=(True,),
    num_heads=2,
    layers_per_block=1,
    cross_attention_dim=24,
    norm_num_groups=8,
)


@pytest.fixture(scope="module")
def one_level():
    """Network, parameters, inputs."""
    network, rng = unet_sd.unet(**ONE_LEVEL), np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: a + 0.1 * rng.standard_normal(a.shape, np.float32), network.init(0)
    )
    x, cond = (
        rng.standard_normal((2, 4, 5, 4), np.float32),
        rng.standard_normal((2, 3, 24)).astype(np.float16),
    )
    return network, params, (x, np.float32([999, 997]), cond)


def test_bfloat16_is_close_and_its_embedding_is_float32(one_level):
    network, params, inputs = one_level
    half = unet_sd.unet(**ONE_LEVEL, dtype="bfloat16")
    embedding, expected = (
        unet_sd.embed(net.bind(params).time_embedding, inputs[1]) for net in (half, network)
    )
    np.testing.assert_array_equal(embedding, expected)
    assert embedding.dtype == jnp.float32 and np.abs(embedding[0] - embedding[1]).max() > 1e-2

    x, noise, cond = inputs
    expected, output = (
        jax.jit(network.apply)(params, x, noise, cond.astype(np.float32)),
        jax.jit(half.apply)(params, *inputs),
    )
    assert output.dtype == jnp.float32 and 1e-4 < error(output, expected) < 3e-2
    assert error(jax.jit(half.apply)(params, x, noise[::-1], cond), output) > 1e-3


@pytest.mark.parametrize("stack", [1, 2])
@pytest.mark.parametrize("remat", [True, "dots_with_no_batch_dims_saveable"])
def test_remat_is_block_by_block(one_level, remat, stack):
    _, _, inputs = one_level
    network = unet_sd.unet(**ONE_LEVEL, remat=remat, stack=stack, dtype="bfloat16")
    text = str(jax.make_jaxpr(network.apply)(network.abstract, *inputs))
    assert text.count("= remat") == 9 * stack  # residual blocks and transformers
    assert text.count("policy=None") == 9 * stack * (remat is True)


def test_a_stack_in_bfloat16_is_close(one_level):
    _, params, (x, noise, cond) = one_level
    network, half = (
        unet_sd.unet(**ONE_LEVEL, stack=2, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    output = jax.jit(half.apply)(network.grow(params), x, noise, cond)
    expected = jax.jit(network.apply)(network.grow(params), x, noise, cond.astype(np.float32))
    assert output.dtype == jnp.float32 and 1e-4 < error(output, expected) < 5e-2


def test_remat_changes_no_gradient():
    block = functools.partial(
        layers.ResnetBlock, 8, 16, c_emb=4, num_groups=4, epsilon=1e-5, dtype=jnp.float32
    )
    x, emb = (
        jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
        for shape in ((2, 3, 4, 8), (2, 4))
    )
    network = layers.functional(lambda rngs: block(rngs=rngs), ((r"", layers.normal(0.5)),))
    params = network.init(0)

    def gradients(remat):
        run = layers.runner(remat)
        return jax.jit(
            jax.grad(
                lambda p, x, emb: jnp.mean(run(network.bind(p), x, emb) ** 2), argnums=(0, 1, 2)
            )
        )(params, x, emb)

    for remat in (True, "nothing_saveable"):
        chex.assert_trees_all_close(gradients(remat), gradients(False), rtol=1e-4, atol=1e-6)


def test_initial_parameters(one_level):
    network, _, _ = one_level
    params = network.init(0)
    chex.assert_trees_all_equal(params, network.init(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, network.abstract)
    for path, a in traverse_util.flatten_dict(params, sep=".").items():
        zero = re.search(r"bias|conv2|proj_out|conv_out", path)
        bound = 0 if zero else 1 if "scale" in path else np.prod(a.shape[:-1]) ** -0.5
        assert 0.8 * bound <= np.abs(a).max() <= bound, path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(num_classes=10),
            r"^num_classes is 10, expected 0: this network is conditioned on sequences; use "
            r"unet_edm for labels.$",
        ),
        (
            dict(attention=(True,)),
            r"^attention has 1 values, expected 4: one per level of block_out_channels.$",
        ),
        (
            dict(num_heads=(5, 10)),
            r"^num_heads has 2 values, expected 4: one per level of block_out_channels.$",
        ),
        (
            dict(norm_num_groups=48),
            r"^block_out_channels 320 is not divisible by norm_num_groups 48; change one of them.$",
        ),
        (
            dict(num_heads=(5, 6, 8, 8)),
            r"^block_out_channels 640 is not divisible by num_heads 6; change one of them.$",
        ),
        (dict(stack=0), r"^stack is 0, expected 1 or more: the number of UNets in series.$"),
        (
            dict(remat="dots"),
            r"^no remat policy 'dots'; use True, False or one of everything_saveable, ",
        ),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        unet_sd.unet(**settings)


@pytest.mark.parametrize(
    ("backend", "dtype", "width", "expected"),
    [
        ("gpu", "bfloat16", 40, "cudnn"),
        ("gpu", "float16", 128, "cudnn"),
        ("gpu", "bfloat16", 160, "xla"),
        ("gpu", "bfloat16", 512, "xla"),
        ("gpu", "bfloat16", 20, "xla"),
        ("gpu", "float32", 40, "xla"),
        ("tpu", "bfloat16", 40, "xla"),
        ("cpu", "bfloat16", 40, "xla"),
    ],
)
def test_flash_attention_where_it_can(monkeypatch, backend, dtype, width, expected):  # trap 16
    implementations = []
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *_, is_causal, implementation: implementations.append(implementation),
    )
    layers.attention(*[jnp.zeros((1, 2, 1, width), dtype)] * 3)
    assert implementations == [expected]


def test_softmax_of_bfloat16_is_float32():  # trap 15
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((1, 64, 1, 512)) * s, jnp.bfloat16) for s in (6, 6, 1)
    )  # logits up to 100
    expected = layers.attention(*(a.astype(jnp.float32) for a in (q, k, v)))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 512**-0.5)
    assert (
        error(layers.attention(q, k, v), expected)
        < 1e-2
        < 5e-2
        < error(jnp.einsum("bhqk,bkhd->bqhd", weights, v), expected)
    )


def test_variance_of_a_norm_with_an_offset():  # trap 11
    x = (300 + np.random.default_rng(0).standard_normal((8, 64))).astype(np.float32)
    double = x.astype(np.float64)
    expected = (double - double.mean(1, keepdims=True)) / np.sqrt(
        double.var(1, keepdims=True) + 1e-5
    )
    norm, fast = (
        layers.layer_norm(64, dtype=jnp.float32, rngs=nnx.Rngs(0)),
        nnx.LayerNorm(64, epsilon=1e-5, rngs=nnx.Rngs(0)),
    )
    assert error(norm(x), expected) < 1e-4 < 1e-3 < error(fast(x), expected)
