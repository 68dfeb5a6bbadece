"""The command: directories in, directories out, and what is refused."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

from dmd_jax import __main__
from dmd_jax.commands import personalise
from dmd_jax.experiment import model as model_lib
from dmd_jax.weights import diffusers, diffusers_write
from tests import test_lora
from tests.helpers import sd

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return sd.build(tmp_path_factory.mktemp("sd") / "plain")


@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    return sd.build(tmp_path_factory.mktemp("sd") / "custom", seed=1)


@pytest.fixture(scope="module")
def file(plain, tmp_path_factory):
    """A LoRA of both networks."""
    return test_lora.save(
        tmp_path_factory.mktemp("lora") / "lora.safetensors", test_lora.kohya(shapes(plain))
    )


def shapes(directory):
    networks = {
        "unet": diffusers.unet(directory)[1],
        "text_encoder": diffusers.text_encoder(directory)[1],
    }
    return {
        network: {name: tensors[name].shape for name in tensors}
        for network, tensors in networks.items()
    }


@pytest.fixture
def copy(plain, tmp_path):
    """To be damaged."""
    return pathlib.Path(shutil.copytree(plain, tmp_path / "copy"))


def contents(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def run(*arguments):
    __main__.main(["personalise", *map(str, arguments)])


def differing(a, b):
    a, b = contents(a), contents(b)
    assert a.keys() == b.keys()
    return {name for name in a if a[name] != b[name]}


def test_lora_as_diffusers_fuses_it(plain, file, tmp_path, monkeypatch):
    (out := tmp_path / "out").mkdir()  # an empty one will do
    run(f"--model={plain}", f"--lora={file}:0.5", f"--lora={file}", f"--out={out}")
    assert differing(plain, out) == {UNET, TEXT, "text_encoder/config.json"}
    pipe = sd.diffusers.StableDiffusionPipeline.from_pretrained(plain)
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(lora_scale=1.5)
    pipe.unload_lora_weights()
    ours = sd.diffusers.StableDiffusionPipeline.from_pretrained(out)
    for network in ("unet", "text_encoder"):
        expected, found = (getattr(part, network).state_dict() for part in (pipe, ours))
        largest = max(tensor.abs().max() for tensor in expected.values())
        assert max((found[name] - expected[name]).abs().max() for name in expected) < 1e-5 * largest
    model, noise = (
        model_lib.load(str(out), sampler=dict(name="ddim", num_steps=2)),
        np.random.default_rng(0).standard_normal((1, 8, 8, 4)),
    )
    assert np.isfinite(model(["a cat"], noise=noise)).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_network_without_factors_is_left_alone(plain, tmp_path):
    for network, changed in (
        ("unet", {UNET}),
        ("text_encoder", {TEXT, "text_encoder/config.json"}),
    ):
        lora = test_lora.save(
            tmp_path / "lora.safetensors", test_lora.kohya({network: shapes(plain)[network]})
        )
        personalise.personalise(plain, tmp_path / network, loras=[(lora, 1.0)])
        assert differing(plain, tmp_path / network) == changed


def test_transfer(plain, custom, file, tmp_path, monkeypatch):
    model = sd.build(tmp_path / "model", seed=2)
    run(
        f"--model={model}",
        f"--custom={custom}",
        f"--base={plain}",
        "--alpha=0.5",
        f"--out={tmp_path / 'out'}",
    )
    found, ours, new, old = (
        safetensors.numpy.load_file(path / UNET)
        for path in (tmp_path / "out", model, custom, plain)
    )
    assert found.keys() == ours.keys()
    for name in found:
        np.testing.assert_allclose(
            found[name], ours[name] + 0.5 * (new[name].astype(np.float64) - old[name]), atol=1e-6
        )
    everything = contents(tmp_path / "out")
    for name in (*personalise.OF_CUSTOM, "scheduler", "model_index.json"):
        source = custom if name in personalise.OF_CUSTOM else model
        expected = {
            path: content for path, content in contents(source).items() if path.startswith(name)
        }
        assert {
            path: content for path, content in everything.items() if path.startswith(name)
        } == expected
    sd.diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")

    both = tmp_path / "both"
    personalise.personalise(model, both, loras=[(file, 1.0)], custom=custom, base=plain, alpha=0.5)
    personalise.personalise(tmp_path / "out", tmp_path / "after", loras=[(file, 1.0)])
    assert not differing(
        both, tmp_path / "after"
    )  # the LoRA's part of the text encoder goes to the custom one


def test_transfer_of_nothing_is_the_identity(plain, custom, tmp_path):
    personalise.personalise(custom, tmp_path / "out", custom=plain, base=plain)
    found, ours = (safetensors.numpy.load_file(path / UNET) for path in (tmp_path / "out", custom))
    assert found.keys() == ours.keys() and all(
        np.array_equal(found[name], ours[name]) for name in ours
    )
    assert contents(tmp_path / "out")[TEXT] == contents(plain)[TEXT]


def test_halves_and_shards_become_whole(plain, file, tmp_path):
    half = sd.build(tmp_path / "half", variant="fp16", shards=True, prefix=True)
    (half / ".git").mkdir()
    (half / "v1-5-pruned.safetensors").touch()
    (half / "unet/diffusion_pytorch_model.fp16.bin").touch()
    (half / "README.md").write_text("a card")
    change(half / "text_encoder/config.json", dtype="float16")
    personalise.personalise(half, tmp_path / "out", loras=[(file, 1.0)])
    names = {name for name in contents(tmp_path / "out") if name.endswith((".safetensors", ".bin"))}
    assert names == {UNET, TEXT, "vae/diffusion_pytorch_model.safetensors"}
    assert (tmp_path / "out/README.md").read_text() == "a card" and not (
        tmp_path / "out/.git"
    ).exists()
    for name in (UNET, TEXT):
        assert {
            tensor.dtype for tensor in safetensors.numpy.load_file(tmp_path / "out" / name).values()
        } == {np.dtype(np.float32)}
    assert all(
        name.startswith("text_model.")
        for name in safetensors.numpy.load_file(tmp_path / "out" / TEXT)
    )
    pipe = sd.diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {sd.torch.float32}
    personalise.personalise(plain, tmp_path / "whole", loras=[(file, 1.0)])
    expected = sd.diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "whole")
    for network in ("unet", "text_encoder"):
        ours, theirs = (getattr(part, network).state_dict() for part in (pipe, expected))
        assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 1e-3  # of halves


def test_pipelines_that_no_library_has(copy, file, tmp_path):
    change(copy / "model_index.json", _class_name="RectifiedFlowPipeline")
    personalise.personalise(copy, tmp_path / "out", loras=[(file, 1.0)])
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (copy / name).read_bytes()


def test_the_sign_of_the_last_convolution(copy, plain, custom, tmp_path):
    """A directory with the UNet -F takes what is added to F with the other sign, and only there."""
    change(copy / "scheduler/scheduler_config.json", **{diffusers_write.NEGATED: True})
    tensors = safetensors.numpy.load_file(copy / UNET)
    turned = {
        name: -tensor if name.startswith("conv_out.") else tensor
        for name, tensor in tensors.items()
    }
    safetensors.numpy.save_file(turned, copy / UNET, metadata={"format": "pt"})
    lora = test_lora.save(
        tmp_path / "lora.safetensors",
        test_lora.kohya({"unet": shapes(plain)["unet"]}, of=("conv_out", "conv1")),
    )
    for model, out in ((copy, "turned"), (plain, "straight")):
        personalise.personalise(
            model, tmp_path / out, loras=[(lora, 1.0)], custom=custom, base=plain
        )
    found, expected = (
        safetensors.numpy.load_file(tmp_path / out / UNET) for out in ("turned", "straight")
    )
    for name in expected:
        np.testing.assert_array_equal(
            -found[name] if name.startswith("conv_out.") else found[name], expected[name]
        )
    personalise.personalise(
        plain, tmp_path / "again", custom=tmp_path / "turned", base=copy
    )  # their difference is of -F too
    again = safetensors.numpy.load_file(tmp_path / "again" / UNET)
    for name in expected:
        np.testing.assert_allclose(again[name], expected[name], atol=1e-6)


def test_not_into_the_model_itself(plain, file):
    with pytest.raises(ValueError, match=r"inside is in .*; choose a directory outside of it"):
        personalise.personalise(plain, plain / "inside", loras=[(file, 1.0)])


def test_what_is_not_written(plain, custom, copy, file, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    other = sd.build(tmp_path / "other", block_out_channels=(16, 64))
    heads = pathlib.Path(shutil.copytree(plain, tmp_path / "heads"))
    change(heads / "unet/config.json", attention_head_dim=8)
    shutil.rmtree(copy / "tokenizer")
    tiny = sd.build(tmp_path / "tiny", tiny=True)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(file.read_bytes()[:-10])
    lora, both = {"loras": [(file, 1.0)]}, {"custom": custom, "base": plain}
    before = sorted(path.name for path in tmp_path.iterdir())
    for message, model, out, options in (
        ("there is nothing to do", plain, "out", {}),
        ("give both, or none", plain, "out", {"base": plain} | lora),
        ("give both, or none", plain, "out", {"custom": plain} | lora),
        ("expected finite numbers", plain, "out", {"loras": [(file, float("nan"))]}),
        (
            "values that are not finite: .*; use smaller changes",
            plain,
            "out",
            {"loras": [(file, 1e38)]},
        ),
        ("full exists already; choose another", plain, "full", lora),
        ("none is not a directory; make it first", plain, "none/out", lora),
        (
            "is not a directory; expected one in the layout of diffusers",
            tmp_path / "none",
            "out",
            lora,
        ),
        ("copy has no tokenizer/; expected a whole directory", copy, "out", lora),
        (
            "copy has no tokenizer/; expected a whole directory",
            plain,
            "out",
            both | {"custom": copy},
        ),
        ("unet has no unet/, vae/.*; expected a whole directory", plain / "unet", "out", lora),
        (
            r"truncated\.safetensors is missing, truncated",
            plain,
            "out",
            {"loras": [(file, 1.0), (truncated, 1.0)]},
        ),
        (
            r"none\.safetensors is missing",
            plain,
            "out",
            {"loras": [(tmp_path / "none.safetensors", 1.0)]},
        ),
        ("is no LoRA for this model", other, "out", lora),
        (
            r"other is of another architecture than .*block_out_channels of its unet is \(16, 64\)",
            plain,
            "out",
            both | {"base": other},
        ),
        (
            "heads is of another architecture than .*num_heads of its unet is 8, expected 4",
            plain,
            "out",
            both | {"custom": heads},
        ),
        (
            "tiny is of another architecture than .*: name of its vae is 'tiny'",
            plain,
            "out",
            both | {"custom": tiny},
        ),
    ):
        with pytest.raises(ValueError, match=message), np.errstate(over="ignore", invalid="ignore"):
            personalise.personalise(model, tmp_path / out, **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == before, (
            message
        )  # nothing half done
    with pytest.raises(ValueError, match="full exists already; choose another"):
        diffusers_write.write_changed(tmp_path / "full", plain, {}, {})


def test_tensors_that_differ_are_all_listed(plain, custom, copy, tmp_path):
    tensors = safetensors.numpy.load_file(copy / UNET)
    bias = tensors.pop("conv_in.bias")
    safetensors.numpy.save_file(
        tensors | {"new.bias": bias, "conv_out.bias": np.zeros(5, np.float32)},
        copy / UNET,
        {"format": "pt"},
    )
    with pytest.raises(
        ValueError,
        match=r"conv_in.bias is missing in the base .*new.bias is only in the base "
        r".*conv_out.bias has shape",
    ):
        personalise.personalise(plain, tmp_path / "out", custom=custom, base=copy)


def test_command_line(plain, file, tmp_path, monkeypatch):
    assert personalise._lora("a.safetensors") == ("a.safetensors", 1.0)
    assert personalise._lora("a:b.safetensors") == ("a:b.safetensors", 1.0)
    assert personalise._lora("a:b.safetensors:-0.5") == ("a:b.safetensors", -0.5)
    with pytest.raises(SystemExit, match="error: there is nothing to do"):
        run(f"--model={plain}", f"--out={tmp_path / 'out'}")
    with pytest.raises(SystemExit, match=r"error: alpha is 0\.5, but there is no custom model"):
        run(
            f"--model={plain}",
            f"--lora={file}",
            "--alpha=0.5",
            f"--out={tmp_path / 'out'}",
        )
    assert not any(tmp_path.iterdir())
