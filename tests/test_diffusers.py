"""Directories of diffusers: parity of what is read, what is written, and what is refused."""

import functools
import json
import pathlib
import shutil
import weakref

import chex
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dmd_jax import denoiser, lookup, process, sharding
from dmd_jax.models import clip_text
from dmd_jax.recipes.dmd import METHOD
from dmd_jax.weights import diffusers, diffusers_files, diffusers_write, state_dict
from tests.helpers import sd

torch = sd.torch
READERS = {"unet": diffusers.unet, "vae": diffusers.vae, "text_encoder": diffusers.text_encoder}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """PyTorch's threads wait for each other longer than these networks take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return sd.build(tmp_path_factory.mktemp("sd") / "plain")


@pytest.fixture
def copy(plain, tmp_path):
    """To be damaged."""
    return pathlib.Path(shutil.copytree(plain, tmp_path / "copy"))


@functools.cache
def compiled(make, settings):
    network = make(**dict(settings))
    return network._replace(apply=jax.jit(network.apply))


def load(directory, name, **options):
    """The network and its parameters."""
    result, tensors = READERS[name](directory, **options)
    if name == "vae":
        make = result.func
        settings = result.keywords
    elif name == "text_encoder":
        make = clip_text.clip
        settings = result
    else:
        make = lookup.find("models", result["name"])
        settings = {key: value for key, value in result.items() if key != "name"}
    network = compiled(make, tuple(settings.items()))
    return network, state_dict.from_torch(tensors, network.abstract)


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.transpose(x, (0, 3, 1, 2))))


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def assert_close(a, b, tolerance=1e-5):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    error = np.abs(a - b).max() / np.abs(b).max()
    assert error < tolerance, error


def assert_unets_agree(directory, params, network, tolerance=1e-5, **options):
    theirs = sd.diffusers.UNet2DConditionModel.from_pretrained(
        directory, subfolder="unet", **options
    )
    x, t, cond = normal(2, 8, 8, 4), np.float32([999, 3]), normal(2, 77, 32)
    with torch.no_grad():
        expected = theirs(nchw(x), torch.from_numpy(t), torch.from_numpy(cond)).sample
    assert_close(network.apply(params, x, t, cond), nhwc(expected), tolerance)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_linear_projection": True, "attention_head_dim": (2, 4)}],
    ids=["sd1", "sd2"],
)
def test_unet(tmp_path, options):
    directory = sd.build(tmp_path / "sd", **options)
    network, params = load(directory, "unet")
    assert_unets_agree(directory, params, network)


@torch.no_grad()
def test_autoencoder(plain):
    theirs = sd.diffusers.AutoencoderKL.from_pretrained(plain, subfolder="vae")
    network, params = load(plain, "vae")
    z, images = normal(1, 8, 8, 4), np.tanh(normal(1, 16, 16, 3))
    assert_close(
        network.apply(params, z), nhwc(theirs.decode(nchw(z) / theirs.config.scaling_factor).sample)
    )
    encoded = jax.jit(lambda params, x: network.bind(params).encode(x))(params, images)
    assert_close(
        encoded, nhwc(theirs.encode(nchw(images)).latent_dist.mode() * theirs.config.scaling_factor)
    )


@torch.no_grad()
def test_tiny_autoencoder(tmp_path):
    directory = sd.build(tmp_path / "sd", tiny=True)
    theirs = sd.diffusers.AutoencoderTiny.from_pretrained(directory, subfolder="vae")
    network, params = load(directory, "vae")
    z, images = normal(1, 8, 8, 4), np.tanh(normal(1, 64, 64, 3))
    assert_close(network.apply(params, z), nhwc(theirs.decode(nchw(z)).sample))
    encoded = jax.jit(lambda params, x: network.bind(params).encode(x))(params, images)
    assert_close(encoded, nhwc(theirs.encode(nchw(images)).latents))
    chex.assert_trees_all_equal(
        load(directory / "vae", "vae")[1], params
    )  # in a directory of its own


@torch.no_grad()
def test_text_encoder(plain):
    theirs = sd.transformers.CLIPTextModel.from_pretrained(plain / "text_encoder")
    tokens = sd.transformers.CLIPTokenizer.from_pretrained(plain / "tokenizer")(
        ["a cat", "the dog, to"], padding="max_length"
    ).input_ids
    network, params = load(plain, "text_encoder")
    assert_close(
        network.apply(params, np.array(tokens)), theirs(torch.tensor(tokens)).last_hidden_state
    )


def test_files_of_all_kinds_are_equal(plain, tmp_path):
    old = sd.build(tmp_path / "old", shards=True, old_names=True, prefix=True)
    assert len(list((old / "unet").glob("*-of-*.safetensors"))) > 1
    assert any(
        ".query." in key
        for key in safetensors.numpy.load_file(next((old / "vae").glob("*.safetensors")))
    )
    for name in READERS:
        chex.assert_trees_all_equal(load(old, name)[1], load(plain, name)[1])
    half = sd.build(tmp_path / "half", shards=True, variant="fp16")
    for name in READERS:
        _, tensors = READERS[name](half)
        assert {tensors[key].dtype for key in tensors} == {np.dtype(np.float16)}
        chex.assert_trees_all_close(
            load(half, name, variant="fp16")[1], load(plain, name)[1], rtol=1e-3, atol=1e-6
        )


def test_names_of_2022(copy):
    file = copy / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
    tensors = {}
    for name, tensor in safetensors.numpy.load_file(file).items():
        if ".attentions." in name:
            start, layer, leaf = (
                name.split("attentions.0.")[0],
                *name.split("attentions.0.")[1].rsplit(".", 1),
            )
            name, tensor = (
                f"{start}attentions.0.{old[layer]}.{leaf}",
                tensor[..., None, None] if tensor.ndim == 2 else tensor,
            )
        tensors[name] = tensor
    expected = load(copy, "vae")[1]
    safetensors.numpy.save_file(tensors, file)
    chex.assert_trees_all_equal(load(copy, "vae")[1], expected)


def test_one_tensor_at_a_time_onto_the_mesh(plain, monkeypatch):
    alive, read = [], diffusers_files.Tensors.__getitem__

    def counting(self, name):
        assert not [name for name, tensor in alive if tensor() is not None]
        tensor = read(self, name)
        alive.append((name, weakref.ref(tensor)))
        return tensor

    network, expected = load(plain, "unet")
    _, tensors = diffusers.unet(plain)
    monkeypatch.setattr(diffusers_files.Tensors, "__getitem__", counting)
    mesh = sharding.make_mesh(data=2, fsdp=4)
    split, whole = (jax.sharding.NamedSharding(mesh, spec) for spec in (jax.P("fsdp"), jax.P()))
    place = lambda array, path: jax.device_put(array, split if array.shape[0] % 4 == 0 else whole)
    params = state_dict.from_torch(tensors, network.abstract, place=place)
    assert len(alive) == len(tensors)
    assert params["time_embedding"]["linear_1"]["kernel"].sharding == split
    chex.assert_trees_all_equal(params, expected)


def test_scheduler(plain, copy):
    assert diffusers.scheduler(plain) == {
        "process": {"name": "VP", "beta_min": 0.00085, "beta_max": 0.012},
        "prediction": "eps",
    }
    change(copy / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert diffusers.scheduler(copy)["prediction"] == "v"
    assert not diffusers.is_one_step(copy)


def test_digest(plain, tmp_path):
    same, other = (sd.build(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert diffusers.digest(plain) == diffusers.digest(same) != diffusers.digest(other)
    assert len(diffusers.digest(plain)) == 64


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_written_directory_samples_in_one_step(tmp_path, prediction):
    teacher = sd.build(tmp_path / "teacher", variant="fp16", prediction=prediction)
    (teacher / "README.md").write_text(
        "---\ntags: [a]\nlicense: creativeml-openrail-m\n---\nlicense: none\n"
    )
    (teacher / "LICENSE.txt").write_text("a licence")
    network, params = load(teacher, "unet")
    params = jax.tree.map(lambda a: 1.1 * a, params)
    out = tmp_path / "out"
    diffusers_write.write(out, teacher, params, base_model="owner/name", method=METHOD)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out",
        "teacher",
    ] and diffusers.is_one_step(out)
    assert_unets_agree(out, params, network)

    pipe = sd.diffusers.StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.safety_checker is None and {
        model.dtype for model in (pipe.unet, pipe.vae, pipe.text_encoder)
    } == {torch.float32}
    z = normal(2, 8, 8, 4)
    options = dict(
        prompt=["a cat", "the dog"],
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=nchw(z),
        output_type="latent",
    )
    latents = pipe(**options).images
    denoise = denoiser.Denoiser(
        network.apply,
        process.VP(),
        {"epsilon": denoiser.eps, "v_prediction": denoiser.v}[prediction],
    )
    with torch.no_grad():
        cond = pipe.encode_prompt(options["prompt"], "cpu", 1, False)[0].numpy()
    assert_close(denoise(params, z, jnp.full(2, 999.0), cond), nhwc(latents))

    card = (out / "README.md").read_text()
    for line in (
        "license: creativeml-openrail-m",
        "base_model: owner/name",
        "num_inference_steps=1, guidance_scale=1.0",
        "2311.18828",
    ):
        assert line in card
    assert card.count("license:") == 1 and (out / "LICENSE.txt").read_text() == "a licence"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_written_weights(plain, tmp_path, dtype):
    _, params = load(plain, "unet")
    diffusers_write.write(tmp_path / "out", plain, params, dtype=dtype, method=METHOD)
    _, tensors = diffusers.unet(tmp_path / "out")
    assert {tensors[name].dtype.name for name in tensors} == {dtype}
    chex.assert_trees_all_close(
        load(tmp_path / "out", "unet")[1],
        params,
        rtol=1e-2 if dtype == "bfloat16" else 1e-3,
        atol=1e-6,
    )
    names = {path.relative_to(plain).as_posix() for path in plain.rglob("*") if path.is_file()}
    assert {
        path.relative_to(tmp_path / "out").as_posix()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    } == names | {"README.md"}
    with safetensors.safe_open(
        tmp_path / "out/unet/diffusion_pytorch_model.safetensors", framework="np"
    ) as file:
        assert file.metadata() == {"format": "pt"}
    card = (tmp_path / "out/README.md").read_text()
    assert (
        "license:" not in card
        and "base_model:" not in card
        and "Unknown: plain came without a statement of its licence" in card
    )


def test_shards_and_variants_are_copied(tmp_path):
    teacher = sd.build(tmp_path / "teacher", variant="fp16", shards=True)
    sd.diffusers.AutoencoderKL.from_pretrained(teacher / "vae", variant="fp16").save_pretrained(
        teacher / "vae", variant="fp16", max_shard_size="200KB"
    )
    (teacher / "vae/diffusion_pytorch_model.fp16.safetensors").unlink(missing_ok=True)
    diffusers_write.write(
        tmp_path / "out", teacher, load(teacher, "unet")[1], dtype="float16", method=METHOD
    )
    assert (tmp_path / "out/text_encoder/model.safetensors").exists()
    chex.assert_trees_all_equal(load(tmp_path / "out", "vae")[1], load(teacher, "vae")[1])
    sd.diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")


def test_what_is_not_written(plain, copy, tmp_path):
    _, params = load(plain, "unet")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    huge = jax.tree.map(lambda a: 1e6 * a, params)
    less = {name: part for name, part in params.items() if name != "conv_in"} | {
        "conv_new": params["conv_out"]
    }
    other = params | {
        "conv_in": params["conv_in"] | {"bias": params["conv_in"]["bias"].reshape(4, 4)}
    }
    for message, out, teacher, content, options in (
        ("full exists already", "full", plain, params, {}),
        ("none is not a directory; make it first", "none/out", plain, params, {}),
        (
            "no dtype 'int8'; there are: float32, float16, bfloat16",
            "out",
            plain,
            params,
            {"dtype": "int8"},
        ),
        ("no finite float16: .*; use another dtype", "out", plain, huge, {"dtype": "float16"}),
        (r"does not fit .*: missing conv_in\.bias; .*unused conv_new", "out", plain, less, {}),
        (r"conv_in\.bias has shape \(4, 4\), expected \(16,\)", "out", plain, other, {}),
        (r"has no unet/, vae/.*; expected a whole directory", "out", plain / "unet", params, {}),
    ):
        with pytest.raises(ValueError, match=message):
            diffusers_write.write(tmp_path / out, teacher, content, **options, method=METHOD)
    next((copy / "text_encoder").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"text_encoder has no weights"):
        diffusers_write.write(tmp_path / "out", copy, params, method=METHOD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "full"]  # nothing half done


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def pickled(directory):
    weights(directory).rename(directory / "unet/diffusion_pytorch_model.bin")


def weights(directory):
    return directory / "unet/diffusion_pytorch_model.safetensors"


def sharded(directory, **weight_map):
    """Puts an index beside the weights, under another name."""
    file = weights(directory).rename(
        directory / "unet/diffusion_pytorch_model-00001-of-00001.safetensors"
    )
    names = dict.fromkeys(safetensors.numpy.load_file(file), file.name) | weight_map
    (directory / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": names})
    )


def unet_config(**values):
    return lambda directory: change(directory / "unet/config.json", **values)


def scheduler_config(**values):
    return lambda directory: change(directory / "scheduler/scheduler_config.json", **values)


BAD = {
    "no component": (
        lambda d: shutil.rmtree(d / "unet"),
        r"has no unet/; expected .*'model_index\.json'",
    ),
    "no directory": (shutil.rmtree, "has no unet/; expected .* there is nothing"),
    "no config": (
        lambda d: (d / "unet/config.json").unlink(),
        r"unet/config\.json is missing or damaged",
    ),
    "broken JSON": (
        lambda d: (d / "unet/config.json").write_text("{"),
        r"unet/config\.json is missing or damaged",
    ),
    "a list": (
        lambda d: (d / "unet/config.json").write_text("[]"),
        r"holds a list, expected a dict",
    ),
    "pickle": (pickled, r"model\.bin is a pickle, which can run code.*convert it by"),
    "no weights": (
        lambda d: weights(d).unlink(),
        "has no weights of no variant.*there are: none at all",
    ),
    "truncated": (lambda d: truncate(weights(d)), r"model\.safetensors is truncated"),
    "missing shard": (
        lambda d: sharded(d, a="b.safetensors"),
        r"index\.json names 'b\.safetensors', which is no file beside it",
    ),
    "shard elsewhere": (
        lambda d: sharded(d, a="../vae/diffusion_pytorch_model.safetensors"),
        "which is no file beside it",
    ),
    "missing tensor": (
        lambda d: sharded(d, a="diffusion_pytorch_model-00001-of-00001.safetensors"),
        r"promises a \(1 in all\)",
    ),
    "other class": (
        unet_config(_class_name="UNet3D"),
        "its unet is not supported: _class_name is 'UNet3D', expected UNet2DCond",
    ),
    "class embeddings": (
        unet_config(class_embed_type="timestep", num_class_embeds=9),
        "_embed_type is 'timestep', .*num_class_embeds is",
    ),
    "added conditions": (
        unet_config(addition_embed_type="text_time"),
        "addition_embed_type is 'text_time', expected none",
    ),
    "scale and shift": (
        unet_config(resnet_time_scale_shift="scale_shift"),
        "is 'scale_shift', expected 'default'",
    ),
    "blocks": (
        unet_config(down_block_types=["SimpleCrossAttnDownBlock2D", "DownBlock2D"]),
        "down_block_types is",
    ),
    "uneven": (
        unet_config(layers_per_block=[1, 2]),
        r"layers_per_block is \(1, 2\), expected one number",
    ),
    "in-painting": (unet_config(in_channels=9), "out_channels is 4, expected 9"),
    "what no one knows": (unet_config(brand_new=1), "brand_new is 1, expected none"),
    "missing setting": (
        lambda d: (d / "unet/config.json").write_text('{"_class_name": "UNet2DConditionModel"}'),
        "sample_size is missing",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_unets_are_refused(copy, case):
    damage, message = BAD[case]
    damage(copy)
    with pytest.raises(ValueError, match=message) as error:
        diffusers.unet(copy)
    assert type(error.value) is ValueError and len(str(error.value)) < 700


def test_other_bad_parts_are_refused(copy):
    with pytest.raises(
        ValueError, match=r"no weights of variant 'fp16', in \.safetensors; there are: no variant"
    ):
        diffusers.unet(copy, "fp16")
    for name, values, message in (
        (
            "vae",
            {"use_quant_conv": False},
            "its vae is not supported: use_quant_conv is False, expected True",
        ),
        ("vae", {"_class_name": "AutoencoderDC"}, "expected AutoencoderKL or AutoencoderTiny"),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types is"),
        ("text_encoder", {"model_type": "t5"}, "model_type is 't5', expected 'clip_text_model'"),
    ):
        config = copy / name / "config.json"
        before = config.read_text()
        change(config, **values)
        with pytest.raises(ValueError, match=message):
            READERS[name](copy)
        config.write_text(before)
    for values, message in (
        ({"beta_schedule": "linear"}, "beta_schedule is 'linear', expected 'scaled_linear'"),
        (
            {"prediction_type": "sample"},
            "prediction_type is 'sample', expected epsilon, v_prediction or flow_prediction",
        ),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True, expected False"),
    ):
        change(copy / "scheduler/scheduler_config.json", **(sd.SCHEDULER | values))
        with pytest.raises(ValueError, match=message):
            diffusers.scheduler(copy)


def test_hub(tmp_path, monkeypatch):
    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert diffusers.find(tmp_path) == tmp_path and not asked
    assert diffusers.find("owner/name") == diffusers.find("owner/name", "fp16") == tmp_path
    listing = [
        "model_index.json",
        "v1-5-pruned.safetensors",
        "safety_checker/model.safetensors",
        "unet/diffusion_pytorch_model.bin",
    ]
    listing += [
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    listing += [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "tokenizer/merges.txt",
        "text_encoder/model.safetensors",
    ]
    found = [
        list(huggingface_hub.utils.filter_repo_objects(listing, allow_patterns=patterns))
        for _, patterns in asked
    ]
    both = ["model_index.json", "unet/config.json", "tokenizer/merges.txt"]
    assert sorted(found[0]) == sorted(
        [*both, "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
    )
    assert sorted(found[1]) == sorted([*both, "unet/diffusion_pytorch_model.fp16.safetensors"])
    for name in ("/no/where", "name", "a/b/c", "../name"):
        with pytest.raises(
            ValueError,
            match=(
                "is not a directory; expected one in the layout of diffusers, or a name on the hub"
            ),
        ):
            diffusers.find(name)


def test_hub_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError,
        match=r"owner/name is not a directory, and was not fetched from the hub .*HF_HUB_OFFLINE",
    ):
        diffusers.find("owner/name")
