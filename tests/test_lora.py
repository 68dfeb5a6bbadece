"""LoRA files and weight differences: PEFT's and diffusers' merges, formulas, and refusals."""

import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dmd_jax.models import unet_sd
from dmd_jax.weights import diffusers, lora, state_dict
from tests.helpers import sd

torch = sd.torch
peft = pytest.importorskip("peft")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj")
TEXT_TARGETS = ("q_proj", "out_proj", "fc1")
BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return sd.build(tmp_path_factory.mktemp("sd") / "plain")


@pytest.fixture(scope="module")
def networks(plain):
    return {
        "unet": dict(diffusers.unet(plain)[1]),
        "text_encoder": dict(diffusers.text_encoder(plain)[1]),
    }


@pytest.fixture(scope="module")
def shapes(networks):
    return {
        network: {name: tensor.shape for name, tensor in tensors.items()}
        for network, tensors in networks.items()
    }


def model(plain, network):
    theirs = {
        "unet": sd.diffusers.UNet2DConditionModel,
        "text_encoder": sd.transformers.CLIPTextModel,
    }[network]
    return theirs.from_pretrained(plain / network)


def disturb(adapted, seed=0):
    """No factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def merged(networks, factors, multiplier=1.0):
    return {
        network: lora.merge(networks[network], factors.get(network, {}), multiplier)
        for network in networks
    }


def assert_changed_alike(ours, theirs, before, count, tolerance=1e-5):
    """`count` tensors have changed; `theirs` is a state dict of torch."""
    theirs = {
        name.removeprefix("text_model."): tensor.detach().float().numpy()
        for name, tensor in theirs.items()
    }
    assert ours.keys() == theirs.keys() == before.keys()
    largest = max(np.abs(theirs[name]).max() for name in before)
    assert {tensor.dtype for tensor in ours.values()} == {np.dtype(np.float32)}
    assert max(np.abs(ours[name] - theirs[name]).max() for name in before) <= tolerance * largest
    assert (
        sum(np.abs(theirs[name] - before[name]).max() > 1e-2 * largest for name in before) == count
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"attn1.to_q": 3, "conv1": 1}}],
    ids=str,
)
@pytest.mark.parametrize("network", ["unet", "text_encoder"])
def test_peft(plain, networks, shapes, tmp_path, network, settings):
    targets = {"unet": TARGETS, "text_encoder": TEXT_TARGETS}[network]
    if network == "text_encoder" and "alpha_pattern" in settings:
        settings = {
            "alpha_pattern": {"encoder.layers.1.mlp.fc1": 3, "layers.0.self_attn.q_proj": 1}
        }
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), **settings)
    adapted = peft.get_peft_model(model(plain, network), config)
    disturb(adapted)
    adapted.save_pretrained(tmp_path)
    factors = lora.read(tmp_path / "adapter_model.safetensors", shapes)
    assert factors.keys() == {network} and {
        len(part.down) for part in factors[network].values()
    } == {4}
    theirs = adapted.merge_and_unload().state_dict()
    assert_changed_alike(
        merged(networks, factors)[network], theirs, networks[network], len(factors[network])
    )


def test_diffusers_file(plain, networks, shapes, tmp_path):
    """Of both networks, with PEFT's settings in the metadata."""
    pipe = sd.diffusers.StableDiffusionPipeline.from_pretrained(plain)
    pipe.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(TARGETS)))
    pipe.text_encoder.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=8, target_modules=list(TEXT_TARGETS))
    )
    for part in (pipe.unet, pipe.text_encoder):
        disturb(part)
    layers = {
        f"{name}_lora_layers": peft.get_peft_model_state_dict(getattr(pipe, name))
        for name in networks
    }
    metadata = {
        f"{name}_lora_adapter_metadata": getattr(pipe, name).peft_config["default"].to_dict()
        for name in networks
    }
    sd.diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, **layers, **metadata)
    factors = lora.read(tmp_path / "pytorch_lora_weights.safetensors", shapes)
    assert {
        network: {part.scale for part in parts.values()} for network, parts in factors.items()
    } == {
        "unet": {1.5},
        "text_encoder": {4.0},
    }
    assert_fused_alike(plain, networks, tmp_path / "pytorch_lora_weights.safetensors", factors, 1.0)


def assert_fused_alike(plain, networks, file, factors, multiplier):
    pipe = sd.diffusers.StableDiffusionPipeline.from_pretrained(plain)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora(lora_scale=multiplier)
    pipe.unload_lora_weights()
    ours = merged(networks, factors, multiplier)
    for network in networks:
        assert_changed_alike(
            ours[network],
            getattr(pipe, network).state_dict(),
            networks[network],
            len(factors[network]),
        )


def kohya(
    shapes,
    dtype=np.float32,
    alpha=6.0,
    rank=4,
    of=("to_q", "to_out.0", "net.0.proj", "proj_in", "fc1", "fc2"),
):
    """The tensors of a file of kohya's."""
    rng, tensors = np.random.default_rng(0), {}
    starts = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    for network, names in shapes.items():
        for name, shape in names.items():
            path, kind = name.rpartition(".")[::2]
            if kind == "weight" and path.endswith(of):
                start, kernel = (
                    starts[network] + path.replace(".", "_"),
                    (1, 1) if len(shape) == 4 else (),
                )
                tensors[f"{start}.lora_up.weight"] = rng.standard_normal(
                    (shape[0], rank, *kernel)
                ).astype(dtype)
                tensors[f"{start}.lora_down.weight"] = rng.standard_normal(
                    (rank, *shape[1:])
                ).astype(dtype)
                if alpha is not None:
                    tensors[f"{start}.alpha"] = np.array(alpha, dtype)
    return tensors


def save(path, tensors, metadata=None):
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("dtype", "alpha"),
    [(np.float32, 6.0), (np.float32, None), (np.float16, 6.0), (ml_dtypes.bfloat16, 6.0)],
    ids=str,
)
def test_kohya_file(plain, networks, shapes, tmp_path, dtype, alpha):
    """The attention of a text encoder is in `test_products_are_of_float32`.

    diffusers 0.42 ignores it with transformers 5.
    """
    file = save(tmp_path / "lora.safetensors", kohya(shapes, dtype, alpha))
    factors = lora.read(file, shapes)
    assert {part.scale for parts in factors.values() for part in parts.values()} == {
        1.0 if alpha is None else 1.5
    }
    assert_fused_alike(plain, networks, file, factors, 0.7)


def test_convolutions(networks, shapes, tmp_path):
    """LoCon is a convolution of rank channels, then a 1x1 one; torch runs the two."""
    name = "down_blocks.0.resnets.0.conv1.weight"
    tensors = kohya(shapes, of=("resnets.0.conv1", "conv_shortcut"))
    factors = lora.read(save(tmp_path / "lora.safetensors", tensors), shapes)
    changed = merged(networks, factors, 0.5)["unet"]
    x = torch.randn(2, shapes["unet"][name][1], 5, 7, generator=torch.Generator().manual_seed(0))
    conv, parts = (
        torch.nn.functional.conv2d,
        [f"lora_unet_down_blocks_0_resnets_0_conv1.lora_{side}.weight" for side in ("down", "up")],
    )
    down, up = (torch.from_numpy(tensors[part]) for part in parts)
    weight = torch.from_numpy(networks["unet"][name])
    expected = conv(x, weight, padding=1) + 0.5 * 6 / 4 * conv(conv(x, down, padding=1), up)
    error = (
        conv(x, torch.from_numpy(changed[name]), padding=1) - expected
    ).abs().max() / expected.abs().max()
    assert error < 1e-5 and len(factors["unet"]) > 4


def test_linear_and_1x1_factors_are_one(networks, shapes, tmp_path):
    tensors = kohya(shapes, of=("to_q", "proj_in"))
    turned = {}
    for key, tensor in tensors.items():
        other = tensor[..., 0, 0] if tensor.ndim == 4 else tensor[..., None, None]
        turned[key] = tensor if key.endswith("alpha") else np.ascontiguousarray(other)
    first, second = (
        lora.read(save(tmp_path / f"{i}.safetensors", part), shapes)
        for i, part in enumerate((tensors, turned))
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    ("network", "of", "start"),
    [
        ("unet", "attn2.to_k", "lora_unet_"),
        ("unet", "attn1.to_out.0", "lora_unet_"),
        ("text_encoder", "q_proj", "lora_te_text_model_"),
    ],
)
def test_products_are_of_float32(networks, shapes, tmp_path, network, of, start):
    rank = 64  # enough for a sum in float16 to be off
    tensors = kohya(shapes, np.float16, alpha=10.0, rank=rank, of=(of,))
    factors = lora.read(save(tmp_path / "lora.safetensors", tensors), shapes)[network]
    changed = lora.merge(networks[network], factors, 2.0)
    assert len(factors) == (2 if network == "text_encoder" else 4)
    for name in factors:
        path = start + name.removesuffix(".weight").replace(".", "_")
        up, down = (
            tensors[f"{path}.lora_{side}.weight"].astype(np.float64) for side in ("up", "down")
        )
        expected = networks[network][name] + 2.0 * 10 / rank * up @ down
        assert np.abs(changed[name] - expected).max() < 1e-5 * np.abs(expected).max()
    halved = lora.merge(
        {name: tensor.astype(np.float16) for name, tensor in networks[network].items()},
        factors,
        2.0,
    )
    assert {tensor.dtype for tensor in halved.values()} == {np.dtype(np.float32)}


def test_merging_back(networks, shapes, tmp_path):
    factors = lora.read(save(tmp_path / "lora.safetensors", kohya(shapes)), shapes)
    there = merged(networks, factors, 0.7)
    back = merged(there, factors, -0.7)
    for network, tensors in networks.items():
        largest = max(np.abs(tensor).max() for tensor in there[network].values())
        for name, tensor in tensors.items():
            assert np.abs(back[network][name] - tensor).max() <= 1e-6 * largest
    assert np.abs(there["unet"]["conv_in.weight"] - networks["unet"]["conv_in.weight"]).max() == 0


def test_parameters_of_ours(plain, shapes, tmp_path):
    settings, tensors = diffusers.unet(plain)
    abstract = unet_sd.unet(
        **{key: value for key, value in settings.items() if key != "name"}
    ).abstract
    params = state_dict.from_torch(tensors, abstract)
    factors = lora.read(save(tmp_path / "lora.safetensors", kohya(shapes)), shapes)["unet"]
    changed = state_dict.from_torch(lora.merge(state_dict.to_torch(params), factors), abstract)
    kernel = lambda tree: tree["down_blocks"]["0"]["attentions"]["0"]["transformer_blocks"]["0"][
        "attn1"
    ]["to_q"]["kernel"]
    up, down, scale = factors["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    np.testing.assert_allclose(kernel(changed) - kernel(params), scale * (up @ down).T, atol=1e-5)


def test_old_names(shapes, tmp_path):
    """Of diffusers before PEFT."""
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
    names = {
        f"{block}.attn1.processor.to_out_lora": (16, 16),
        f"{block}.attn2.processor.to_k_lora": (16, 32),
        layer: (32, 32),
    }
    tensors = {
        f"{name}.up.weight": np.ones((outputs, 3), np.float32)
        for name, (outputs, _) in names.items()
    }
    tensors |= {
        f"{name}.down.weight": np.ones((3, inputs), np.float32)
        for name, (_, inputs) in names.items()
    }
    factors = lora.read(save(tmp_path / "lora.safetensors", tensors), shapes)
    block = block.removeprefix("unet.")
    assert factors["unet"].keys() == {
        f"{block}.attn1.to_out.0.weight",
        f"{block}.attn2.to_k.weight",
    }
    assert factors["text_encoder"].keys() == {"encoder.layers.0.self_attn.q_proj.weight"}


def test_names_are_unique_at_full_size():
    with torch.device("meta"):
        unet = sd.diffusers.UNet2DConditionModel(
            cross_attention_dim=768, attention_head_dim=8
        ).state_dict()
        text = sd.transformers.CLIPTextModel(
            sd.transformers.CLIPTextConfig(hidden_size=768, num_hidden_layers=12)
        ).state_dict()
    shapes = {
        "unet": unet,
        "text_encoder": {name.removeprefix("text_model."): tensor for name, tensor in text.items()},
    }
    shapes = {
        network: {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for network, tensors in shapes.items()
    }
    table = lora._table(shapes)
    assert {len(targets) for targets in table.values()} == {1}
    for path in (
        "down_blocks_0_resnets_0_time_emb_proj",
        "up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_out_0",
    ):
        ((_, name),) = table[path]
        assert name.endswith((".time_emb_proj.weight", ".attn2.to_out.0.weight"))


def with_bad(**more):
    """`more`: names without start, which are given or, where None, left out."""

    def damage(tensors):
        for name, tensor in more.items():
            key = f"lora_unet_{BLOCK}_attn1_to_q.{name.replace('__', '.')}"
            tensors.pop(key, None)
            if tensor is not None:
                tensors[key] = np.asarray(tensor, np.float32)

    return damage


def unknown(key, shape=(4, 16)):
    return lambda tensors: tensors.update({key: np.ones(shape, np.float32)})


NAME = r"unet\.down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn1\.to_q\.weight"
BAD = {
    "half a pair": (with_bad(lora_up__weight=None), f"{NAME} has no up;"),
    "the other half": (with_bad(lora_down__weight=None), f"{NAME} has no down;"),
    "alpha alone": (
        with_bad(lora_up__weight=None, lora_down__weight=None),
        f"{NAME} has no up and no down;",
    ),
    "alpha is no number": (
        with_bad(alpha=[1, 2]),
        rf"{NAME} has an alpha of shape \(2,\), expected one number",
    ),
    "wrong width": (
        with_bad(lora_down__weight=np.ones((4, 8))),
        rf"{NAME} has factors of shapes \(16, 4\) and \(4, 8\), expected",
    ),
    "wrong rank": (
        with_bad(lora_down__weight=np.ones((3, 16))),
        r"\(3, 16\), expected \(16, 'rank'\) and \('rank', 16\)",
    ),
    "turned": (
        with_bad(lora_down__weight=np.ones((16, 4)), lora_up__weight=np.ones((4, 16))),
        r"shapes \(4, 16\) and \(16, 4\)",
    ),
    "no rank": (
        with_bad(lora_down__weight=np.ones((0, 16)), lora_up__weight=np.ones((16, 0))),
        r"and \(0, 16\)",
    ),
    "3x3 of a linear layer": (
        with_bad(lora_down__weight=np.ones((4, 16, 3, 3))),
        r"and \(4, 16, 3, 3\)",
    ),
    "one number": (with_bad(lora_down__weight=1), r"and \(\)"),
    "not finite": (with_bad(alpha=np.nan), "to_q.alpha has values that are not finite"),
    "LoHa": (with_bad(hada_w1_a=np.ones((4, 4))), r"to_q\.hada_w1_a is of a LoHa, not supported"),
    "LoKr": (with_bad(lokr_w1=np.ones((4, 4))), r"to_q\.lokr_w1 is of a LoKr, not supported"),
    "DoRA": (with_bad(dora_scale=np.ones((1, 4))), r"to_q\.dora_scale is of a DoRA, not supported"),
    "three factors": (
        with_bad(lora_mid__weight=np.ones((4, 4, 3, 3))),
        r"lora_mid\.weight is of a LoCon of three factors, not supported",
    ),
    "bias": (with_bad(diff_b=np.ones(16)), r"to_q\.diff_b is not supported"),
    "unknown module": (
        unknown("lora_unet_input_blocks_1_1_proj_in.lora_up.weight"),
        r"blocks_1_1_proj_in\.lora_up\.weight is of no",
    ),
    "of a norm": (
        unknown("unet.conv_norm_out.lora_A.weight"),
        r"conv_norm_out\.lora_A\.weight is of no module of these networks",
    ),
    "other network": (
        unknown("lora_te_mid_block_resnets_0_conv1.lora_up.weight"),
        "lora_te_mid_block_resnets_0_conv1.* is of no",
    ),
    "second text encoder": (
        unknown("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"),
        "lora_te2_.* is of no module",
    ),
    "twice": (unknown(f"unet.{BLOCK}_attn1.to_q.lora_A.weight"), "comes twice, under two names"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_refused(shapes, tmp_path, case):
    damage, message = BAD[case]
    tensors = kohya(shapes)
    damage(tensors)
    unknown("lora_unet_no_such_module.alpha", ())(tensors)  # all is listed
    with pytest.raises(ValueError, match=f"(?s)is no LoRA for this model: .*{message}") as error:
        lora.read(save(tmp_path / "lora.safetensors", tensors), shapes)
    assert (
        "lora_unet_no_such_module.alpha is of no module" in str(error.value)
        and len(str(error.value)) < 900
    )


def test_bad_files_are_refused(shapes, tmp_path):
    whole = save(tmp_path / "lora.safetensors", kohya(shapes)).read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"PK\x03\x04 a pickle of torch"):
        (tmp_path / "damaged.safetensors").write_bytes(content)
        with pytest.raises(
            ValueError,
            match=r"damaged\.safetensors is missing, truncated or not a \.safetensors file",
        ):
            lora.read(tmp_path / "damaged.safetensors", shapes)
    with pytest.raises(ValueError, match=r"none\.safetensors is missing"):
        lora.read(tmp_path / "none.safetensors", shapes)
    with pytest.raises(ValueError, match="it is empty"):
        lora.read(save(tmp_path / "empty.safetensors", {}), shapes)


def test_settings_of_peft_are_read(shapes, tmp_path):
    names = {
        f"base_model.model.mid_block.resnets.0.time_emb_proj.lora_{side}.weight" for side in "AB"
    }
    tensors = {name: np.ones((2, 64) if "_A." in name else (32, 2), np.float32) for name in names}
    file, config = (
        save(tmp_path / "adapter_model.safetensors", tensors),
        pathlib.Path(tmp_path / "adapter_config.json"),
    )
    with pytest.raises(
        ValueError, match=r"adapter_config\.json, which has the alpha of the LoRA, is missing"
    ):
        lora.read(file, shapes)
    for content in (
        "{",
        "3",
        '{"lora_alpha": "a"}',
        '{"lora_alpha": 1, "alpha_pattern": {"(": 1}}',
        '{"lora_alpha": 1, "alpha_pattern": [1]}',
    ):
        config.write_text(content)
        with pytest.raises(
            ValueError,
            match=r"adapter_config\.json, which has the alpha of the LoRA, is missing or damaged",
        ):
            lora.read(file, shapes)
    config.write_text(
        json.dumps({"lora_alpha": 6, "use_dora": True, "init_lora_weights": "pissa_niter_4"})
    )
    with pytest.raises(
        ValueError,
        match=(
            "use_dora is True, which is not supported; init_lora_weights is "
            "'pissa_niter_4', which is not"
        ),
    ):
        lora.read(file, shapes)
    config.write_text(
        json.dumps({"lora_alpha": 6, "use_dora": False, "init_lora_weights": "gaussian"})
    )
    (part,) = lora.read(file, shapes)["unet"].values()
    assert part.scale == 3.0


def test_factors_of_another_network(networks, shapes, tmp_path):
    factors = lora.read(save(tmp_path / "lora.safetensors", kohya(shapes)), shapes)
    with pytest.raises(
        ValueError, match=r"there are factors of encoder\.layers\.0.*which these tensors lack"
    ):
        lora.merge(networks["unet"], factors["text_encoder"])


def test_transfer(networks):
    base, rng = networks["unet"], np.random.default_rng(0)
    noise = lambda: {
        name: tensor + rng.standard_normal(tensor.shape).astype(np.float32)
        for name, tensor in base.items()
    }
    ours, custom = noise(), noise()
    jax.tree.map(np.testing.assert_array_equal, lora.transfer(ours, base, base, 0.7), ours)
    changed = lora.transfer(ours, custom, base, 0.7)
    assert changed.keys() == ours.keys() and any(name.endswith("norm1.bias") for name in changed)
    for name in ours:
        expected = ours[name].astype(np.float64) + 0.7 * (
            custom[name].astype(np.float64) - base[name]
        )
        assert np.abs(changed[name] - expected).max() < 1e-6 * np.abs(expected).max()
    halves = (
        {name: tensor.astype(np.float16) for name, tensor in part.items()}
        for part in (custom, base)
    )
    changed = lora.transfer(ours, *halves)
    name = "conv_in.weight"
    exact = custom[name].astype(np.float16).astype(np.float32) - base[name].astype(
        np.float16
    ).astype(np.float32)
    np.testing.assert_array_equal(changed[name], ours[name] + exact)


def test_transfer_of_another_architecture_is_refused(networks):
    ours = networks["unet"]
    custom = {name: tensor for name, tensor in ours.items() if name != "conv_in.weight"} | {
        "new.weight": np.zeros(3)
    }
    base = ours | {"conv_out.bias": np.zeros(5), "conv_in.bias": np.zeros((16, 1))}
    with pytest.raises(ValueError, match="the three models are not of one architecture") as error:
        lora.transfer(ours, custom, base)
    for part in (
        "conv_in.weight is missing in the custom model",
        "new.weight is only in the custom model",
        "conv_out.bias has shape (4,), in the custom model (4,), in the base model (5,)",
        "conv_in.bias has shape (16,)",
    ):
        assert part in str(error.value)
