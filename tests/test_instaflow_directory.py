"""Directories of rectified flows: those with InstaFlow's mark, and those that an export writes."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from dmd_jax import lookup
from dmd_jax.commands import export
from dmd_jax.experiment import configs
from dmd_jax.experiment import model as model_lib
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.recipes.dmd import METHOD
from dmd_jax.runtime import storage
from dmd_jax.stages import import_weights
from dmd_jax.weights import diffusers, diffusers_write, state_dict
from tests.helpers import sd
from tests.helpers.runs import stage_of, values_of

torch = sd.torch
FLOW_TO_DATA = {"process": {"name": "RectifiedFlow"}, "prediction": "flow_to_data"}
TEXTS = ["a cat", "the dog"]
TOLERANCE = 1e-5  # of the largest output


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """PyTorch's threads wait for each other longer than these networks take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def instaflow(tmp_path_factory):
    """As the public ones are: Stable Diffusion's scheduler, and a pipeline of another name."""
    directory = sd.build(tmp_path_factory.mktemp("sd") / "instaflow")
    change(directory / "model_index.json", _class_name="RectifiedFlowPipeline")
    return directory


@pytest.fixture
def copy(instaflow, tmp_path):
    return pathlib.Path(shutil.copytree(instaflow, tmp_path / "copy"))


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.transpose(x, (0, 3, 1, 2))))


def error(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.fixture(scope="module")
def theirs(instaflow):
    """`(z [B, h, w, c], label, texts) -> F`, of diffusers and transformers."""
    unet = sd.diffusers.UNet2DConditionModel.from_pretrained(instaflow, subfolder="unet")
    text_encoder = sd.transformers.CLIPTextModel.from_pretrained(instaflow / "text_encoder")
    tokenizer = sd.transformers.CLIPTokenizer.from_pretrained(instaflow / "tokenizer")

    @torch.no_grad()
    def predict(z, label, texts):
        tokens = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        labels = torch.full((len(z),), label, dtype=torch.float32)
        return nhwc(unet(nchw(z), labels, text_encoder(tokens).last_hidden_state).sample)

    return predict


@pytest.fixture(scope="module")
def z():
    return np.random.default_rng(0).standard_normal((2, 8, 8, 4), np.float32)


def latents(model, z):
    return model.sample(
        model.params,
        {"z": z, "key": np.zeros((2, 2), np.uint32), "cond": model.encoder.encode(TEXTS)},
    )


def test_the_mark_is_the_pipelines_name(copy):
    assert diffusers.scheduler(copy) == FLOW_TO_DATA and diffusers.is_one_step(copy)
    change(copy / "model_index.json", _class_name="StableDiffusionPipeline")
    without = diffusers.scheduler(copy)
    assert (
        without["process"]["name"] == "VP"
        and without["prediction"] == "eps"
        and not diffusers.is_one_step(copy)
    )
    (copy / "model_index.json").unlink()
    assert diffusers.scheduler(copy) == without and not diffusers.is_one_step(copy)


def test_the_scheduler_of_a_flow(copy):
    change(copy / "model_index.json", _class_name="StableDiffusionPipeline")
    change(
        copy / "scheduler/scheduler_config.json",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
    )
    assert diffusers.scheduler(copy) == FLOW_TO_DATA | {
        "prediction": "flow"
    } and not diffusers.is_one_step(copy)
    change(copy / "scheduler/scheduler_config.json", use_flow_sigmas=False)
    with pytest.raises(
        ValueError, match="its scheduler is not supported: use_flow_sigmas is False, expected True"
    ):
        diffusers.scheduler(copy)


def test_one_step_at_the_label_1000(instaflow, theirs, z):
    model = model_lib.load(instaflow, batch_size=2)
    assert model.sampler.nfe == 1
    made = latents(model, z)
    assert error(made, z + theirs(z, 1000.0, TEXTS)) < TOLERANCE
    for wrong in (z + theirs(z, 999.0, TEXTS), z - theirs(z, 1000.0, TEXTS)):
        assert error(made, wrong) > 10 * TOLERANCE


def test_many_guided_steps(instaflow, theirs, z):
    """As 2-rectified flow is sampled."""
    model = model_lib.load(
        instaflow, batch_size=2, sampler=dict(name="euler", num_steps=3, guidance_scale=1.5)
    )
    assert model.sampler.nfe == 3

    def integrate(labels, scale=1.5):
        x = z.astype(np.float64)
        for label in labels:
            null, velocity = (
                theirs(x.astype(np.float32), label, texts) for texts in (["", ""], TEXTS)
            )
            x += (null + scale * (velocity - null)) / len(labels)
        return x

    made, labels = latents(model, z), [1000 * (1 - i / 3) for i in range(3)]
    assert error(made, integrate(labels)) < TOLERANCE
    for wrong in (
        integrate([999 / 1000 * label for label in labels]),
        integrate(labels, -1.5),
        integrate(labels, 1.0),
    ):
        assert error(made, wrong) > 10 * TOLERANCE


def tiny(directory, **teacher):
    config = configs.load("coco:tiny")
    config.variables.checkpoint = str(directory)
    config.mesh.data = 1
    config.teacher.update(teacher)
    return config


def test_import(instaflow, tmp_path):
    config = tiny(instaflow, **FLOW_TO_DATA)
    import_weights.run(stage_of(config, "teacher"), tmp_path)
    assert storage.read_json(tmp_path / "teacher/source.json")["directory"] == str(instaflow)
    assert import_weights.done(stage_of(config, "teacher"), tmp_path)


@pytest.mark.parametrize(
    ("marked", "teacher", "match"),
    [
        (
            True,
            {},
            "^process.name is 'RectifiedFlow' in the checkpoint, 'VP' in the config; "
            "prediction is 'flow_to_data' in .* 'eps' in",
        ),
        (
            False,
            FLOW_TO_DATA,
            "^process.name is 'VP' in the checkpoint, 'RectifiedFlow' in the config; "
            "prediction is 'eps' in .* 'flow_to",
        ),
        (
            True,
            FLOW_TO_DATA | {"prediction": "flow"},
            "^prediction is 'flow_to_data' in the checkpoint, 'flow' in the config",
        ),
        (True, FLOW_TO_DATA | {"stack": 2}, "^stack is 1 in the checkpoint, 2 in the config"),
    ],
)
def test_an_import_that_the_config_does_not_describe(copy, tmp_path, marked, teacher, match):
    if not marked:
        (copy / "model_index.json").unlink()
    config = tiny(copy, **{key: value for key, value in teacher.items() if key != "stack"})
    config.teacher.network = dict(config.network, stack=teacher.get("stack", 1))
    with pytest.raises(ValueError, match=match):
        import_weights.run(stage_of(config, "teacher"), tmp_path)


@pytest.fixture(params=["flow_to_data", "flow"])
def student(request, copy, tmp_path):
    """Config and workdir of a run whose stage `distil` made the weights of the directory."""
    (copy / "model_index.json").unlink()  # that of the teacher
    (copy / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    config, workdir = tiny(copy), tmp_path / "run"
    sampler = dict(name="one_step")
    flow = FLOW_TO_DATA | {"prediction": request.param}
    config.distil = dict(
        program="train",
        recipe=dict(name="distil"),
        sampler=sampler,
        data={},
        batch_size=1,
        num_steps=1,
        network=dict(config.network, stack=1),
        **flow,
    )
    config.stages = ("teacher", "distil")
    workdir_lib.claim(values_of(config), workdir)
    for stage in config.stages:
        (workdir / stage).mkdir()
        storage.write_json(workdir / stage / workdir_lib.SOURCE, {"directory": str(copy)})
    return config, workdir


def test_an_export_is_what_diffusers_samples(student, theirs, z, tmp_path):
    config, workdir = student
    sign = {"flow_to_data": 1, "flow": -1}[config.distil.prediction]
    export.export(workdir, "distil", tmp_path / "out", base_model="owner/name")
    assert diffusers.is_one_step(tmp_path / "out")
    assert diffusers.scheduler(tmp_path / "out") == FLOW_TO_DATA | {"prediction": "flow"}

    pipe = sd.diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    options = dict(prompt=TEXTS, num_inference_steps=1, guidance_scale=1.0, latents=nchw(z))
    expected = z + sign * theirs(z, 1000.0, TEXTS)
    assert error(nhwc(pipe(**options, output_type="latent").images), expected) < TOLERANCE
    assert pipe.scheduler.timesteps.tolist() == [1000]
    images = pipe(**options, output_type="np").images
    for model in (
        model_lib.load(workdir, stage="distil", batch_size=2),
        model_lib.load(tmp_path / "out", batch_size=2),
    ):
        assert error(latents(model, z), expected) < TOLERANCE
        np.testing.assert_allclose(
            np.clip(model(TEXTS, noise=z) / 2 + 0.5, 0, 1), images, atol=1e-4
        )
    card = (tmp_path / "out/README.md").read_text()
    for line in (
        "InstaFlow (rectified flow, https://arxiv.org/abs/2309.06380)",
        "one-step, instaflow",
        "`z - unet(z, 1000, text)`",
    ):
        assert line in card
    assert "license: creativeml-openrail-m" in card and "2311.18828" not in card


def test_what_is_not_exported(student, tmp_path):
    config, workdir = student
    config.teacher.sampler = dict(name="one_step")
    for stage, changes, message in (
        (
            "teacher",
            {},
            "'teacher' has trained nothing; use the directory that it was imported from, .*copy",
        ),
        (
            "distil",
            {"network.stack": 2},
            "'distil' trained a stack of 2 UNets, for which diffusers has no class",
        ),
        (
            "distil",
            {"recipe.name": "teacher"},
            "was trained by teacher, which makes no one-step generator",
        ),
        (
            "distil",
            {"prediction": "rectified"},
            "no scheduler for the process RectifiedFlow with the prediction 'rectified'; "
            "expected VP with",
        ),
    ):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(
            {f"distil.{key}": value for key, value in changes.items()}
        )
        storage.write_json(workdir / "config.json", json.loads(changed.to_json()))
        with pytest.raises(ValueError, match=message):
            export.export(workdir, stage, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_other_sign_is_exact(instaflow, tmp_path, dtype):
    settings, tensors = diffusers.unet(instaflow)
    params = state_dict.from_torch(
        tensors, lookup.find("models", settings.pop("name"))(**settings).abstract
    )
    for prediction in ("flow", "flow_to_data"):
        trained_for = FLOW_TO_DATA | {"prediction": prediction}
        diffusers_write.write(
            tmp_path / prediction,
            instaflow,
            params,
            dtype=dtype,
            method=METHOD,
            trained_for=trained_for,
        )
    same, other = (
        diffusers.unet(tmp_path / prediction)[1] for prediction in ("flow", "flow_to_data")
    )
    for name in same:
        np.testing.assert_array_equal(
            other[name], -same[name] if name.startswith("conv_out.") else same[name]
        )
