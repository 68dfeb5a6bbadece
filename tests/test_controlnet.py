"""Parity with diffusers: the residuals, the UNet that gets them, and images of the pipeline."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import process, samplers
from dmd_jax.commands import sample
from dmd_jax.data import pixels
from dmd_jax.experiment import model as model_lib
from dmd_jax.models import controlnet, layers, unet_edm, unet_sd
from dmd_jax.weights import diffusers, state_dict
from tests.helpers import sd
from tests.test_features import nchw
from tests.test_unet_sd import TOLERANCE, checksum, error, nhwc, oracle, params_of

torch = sd.torch
KINDS = {  # of the first the skips are as many as those of the public ones
    "sd1": dict(
        block_out_channels=(8, 8, 16, 16),
        attention=(True, False, False, False),
        num_heads=4,
        layers_per_block=2,
    ),
    "sd2": dict(
        block_out_channels=(8, 16),
        attention=(False, True),
        num_heads=(2, 4),
        layers_per_block=1,
        use_linear_projection=True,
    ),
}
SHAPES = {"sd1": (2, 7, 9, 4), "sd2": (2, 4, 6, 4)}
EMBEDDING = {
    "sd1": (4, 6, 8, 12),
    "sd2": (4, 8),
}  # that of sd1 halves the image three times, as the public ones do
SCALE = np.float32([1, 0.4])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """PyTorch's threads wait for each other longer than these networks take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(kind):
    """The UNet and the ControlNet."""
    settings = KINDS[kind] | dict(cross_attention_dim=24, norm_num_groups=4)
    return unet_sd.unet(**settings), controlnet.controlnet(
        **settings, conditioning_embedding_out_channels=EMBEDDING[kind]
    )


def oracles_of(kind):
    settings = dict(KINDS[kind], cross_attention_dim=24, norm_num_groups=4)
    attention, settings["attention_head_dim"] = settings.pop("attention"), settings.pop("num_heads")
    settings["down_block_types"] = [
        "CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention
    ]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)]
    control = oracle(
        "ControlNetModel", **settings, conditioning_embedding_out_channels=EMBEDDING[kind]
    )
    return oracle("UNet2DConditionModel", **settings, up_block_types=up), control


class Case:
    """Oracles of a kind, our parameters and inputs, and what the oracles make of them."""

    def __init__(self, kind):
        rng, (n, h, w, _) = np.random.default_rng(1), SHAPES[kind]
        factor = 2 ** (len(EMBEDDING[kind]) - 1)
        self.networks, self.oracles = make(kind), oracles_of(kind)
        self.params = dict(
            zip(("unet", "controlnet"), map(params_of, self.oracles, self.networks), strict=True)
        )
        self.x, self.noise = rng.standard_normal(SHAPES[kind], np.float32), np.float32([999, 437.5])
        text = rng.standard_normal((n, 5, 24), np.float32)
        control = rng.uniform(size=(n, factor * h, factor * w, 3)).astype(np.float32)
        self.cond = {"text": text, "control": control, "scale": SCALE}
        self.residuals, self.output = self.torch(self.noise)
        self.apply = jax.jit(controlnet.controlled(*self.networks))

    @torch.no_grad()
    def torch(self, noise):
        unet, control = self.oracles
        text, scale = (
            torch.from_numpy(self.cond["text"]),
            torch.from_numpy(SCALE)[:, None, None, None],
        )
        inputs = nchw(self.x), torch.from_numpy(noise), text
        down, mid = control(
            *inputs,
            controlnet_cond=nchw(self.cond["control"]),
            conditioning_scale=scale,
            return_dict=False,
        )
        output = unet(
            *inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        return (nhwc(mid), [nhwc(a) for a in down]), nhwc(output)


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def small():
    return Case("sd2")


def test_residuals(case):
    _, network = case.networks
    inputs = case.x, case.noise, *(case.cond[name] for name in ("text", "control", "scale"))
    middle, skips = jax.jit(network.apply)(case.params["controlnet"], *inputs)
    assert len(skips) == len(case.residuals[1]) == (12 if case.x.shape[1] == 7 else 4)
    for ours, theirs in zip((middle, *skips), (case.residuals[0], *case.residuals[1]), strict=True):
        assert error(ours, theirs) < TOLERANCE
        assert error(ours[1:], 0.4 / SCALE[0] * ours[:1]) > 0.1  # each image has its own


def test_the_unet_with_them(case):
    result = case.apply(case.params, case.x, case.noise, case.cond)
    assert error(result, case.output) < TOLERANCE


def test_without_them_the_unet_is_alone(small):
    unet, network = small.networks
    alone = jax.jit(unet.apply)(small.params["unet"], small.x, small.noise, small.cond["text"])
    assert error(alone, small.output) > 0.1
    unscaled = small.apply(small.params, small.x, small.noise, small.cond | {"scale": 0 * SCALE})
    np.testing.assert_array_equal(unscaled, alone)
    fresh = small.params | {"controlnet": network.init(0)}  # its last convolutions are zeros
    np.testing.assert_array_equal(small.apply(fresh, small.x, small.noise, small.cond), alone)


def test_one_step_of_a_flow(small):
    """z + v, with v = -F and F told that t is 1000."""
    flow = denoiser_lib.Denoiser(small.apply, process.RectifiedFlow(), denoiser_lib.flow)
    images = samplers.one_step(flow, flow.process).sample(small.params, small.x, small.cond)
    _, output = small.torch(np.float32([1000, 1000]))
    assert error(images, small.x - output) < TOLERANCE


def test_guidance_sees_the_image_twice(small):
    """Three images of a batch are those that are made one by one."""
    denoise = denoiser_lib.Denoiser(small.apply, process.VP(), denoiser_lib.eps)
    rng = np.random.default_rng(2)
    x_t, t = rng.standard_normal((3, 4, 6, 4), np.float32), np.float32([999, 500, 20])
    text, null = (
        rng.standard_normal((3, 5, 24), np.float32),
        rng.standard_normal((5, 24), np.float32),
    )
    control, scale = rng.uniform(size=(3, 8, 12, 3)).astype(np.float32), np.float32([1, 0.5, 2])
    guided = denoiser_lib.guided(denoise, 3.0, {"text": null, "control": None, "scale": None})
    batch = guided(small.params, x_t, t, {"text": text, "control": control, "scale": scale})
    for i in range(3):
        x, time, image, weight = (np.stack([a[i]] * 2) for a in (x_t, t, control, scale))
        x_null, x_cond = denoise(
            small.params,
            x,
            time,
            {"text": np.stack([null, text[i]]), "control": image, "scale": weight},
        )
        assert error(batch[i], x_null + 3 * (x_cond - x_null)) < TOLERANCE
    for null in (None, {"text": None}):
        with pytest.raises(
            ValueError,
            match=r"guidance of scale 3\.0 needs a null_cond, got .*; name the condition",
        ):
            denoiser_lib.guided(denoise, 3.0, null)


def test_bfloat16(small):
    """Residuals come in the dtype of the features that they are added to."""
    settings = dict(KINDS["sd2"], cross_attention_dim=24, norm_num_groups=4, dtype="bfloat16")
    network = controlnet.controlnet(
        **settings, conditioning_embedding_out_channels=EMBEDDING["sd2"]
    )
    inputs = small.x, small.noise, *(small.cond[name] for name in ("text", "control", "scale"))
    residuals = jax.eval_shape(network.apply, network.abstract, *inputs)
    assert {a.dtype for a in jax.tree.leaves(residuals)} == {jnp.dtype("bfloat16")}
    both = controlnet.controlled(unet_sd.unet(**settings), network)
    result = jax.jit(both)(small.params, small.x, small.noise, small.cond)
    assert result.dtype == jnp.float32 and 1e-4 < error(result, small.output) < 5e-2


def test_the_public_checkpoints_parameters():
    full = controlnet.controlnet()
    assert (
        sum(a.size for a in jax.tree.leaves(full.abstract)) == 361_279_120
        and len(jax.tree.leaves(full.abstract)) == 340
    )
    assert (
        checksum(full.abstract)
        == "405e1981f291b84c10985e95edc775178549ed0ba77a07e3f587ecae2698f77d"
    )
    assert controlnet.control_shape(full, (64, 96, 4)) == (512, 768, 3)


def test_networks_that_do_not_fit():
    unet, _ = make("sd2")
    with pytest.raises(ValueError) as told:
        controlnet.controlled(unet, controlnet.controlnet())
    assert str(told.value) == (
        "the ControlNet does not fit the UNet: block_out_channels is (320, 640, 1280, 1280), "
        "the UNet's is (8, 16); layers_per_block is 2, "
        "the UNet's is 1; cross_attention_dim is 768, the UNet's is 24; use one that was made "
        "for such a model."
    )
    other = unet_edm.ddpmpp(
        size=8, channels=1, num_classes=10, width=8, multipliers=(1,), num_blocks=1, attention=()
    )
    with pytest.raises(ValueError, match="a ControlNet is for the UNet of Stable Diffusion"):
        controlnet.controlled(other, controlnet.controlnet())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("controlnet")
    sd.build(path / "sd")
    sd.build_controlnet(path / "control")
    return path


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(3).integers(256, size=(3, 16, 16, 3)).astype(np.float32) / 255


@pytest.fixture(scope="module")
def model(files):
    sampler = dict(name="pndm", num_steps=4, guidance_scale=5.0)
    return model_lib.load(files / "sd", batch_size=4, sampler=sampler, controlnet=files / "control")


def test_many_steps_are_diffusers_pipeline(files, model, images):
    control = sd.diffusers.ControlNetModel.from_pretrained(files / "control")
    load = sd.diffusers.StableDiffusionControlNetPipeline.from_pretrained
    pipeline = load(files / "sd", controlnet=control, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    prompts, noise = (
        ["a cat", "the dog", "a photo of the dog"],
        np.random.default_rng(1).standard_normal((3, 8, 8, 4), dtype=np.float32),
    )
    options = dict(
        num_inference_steps=4,
        guidance_scale=5.0,
        latents=nchw(noise),
        output_type="np",
        controlnet_conditioning_scale=0.7,
    )
    theirs = pipeline(prompts, image=nchw(images), **options).images
    ours = model(prompts, noise=noise, control=images, control_scale=0.7)
    np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), theirs, atol=1e-5)
    one = model(prompts, noise=noise, control=images[:1], control_scale=0.7)
    np.testing.assert_allclose(one[0], ours[0], atol=1e-5)
    assert np.abs(one[1] - ours[1]).max() > 1e-2


def test_control_without_a_controlnet(files, images):
    alone = model_lib.load(files / "sd")
    for bad in (dict(control=images[:1]), dict(control_scale=0.5)):
        with pytest.raises(
            ValueError,
            match="control needs a ControlNet, expected none here; load the model with controlnet=",
        ):
            alone(["a cat"], **bad)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: None, r"expected control, images \(16, 16, 3\) for the ControlNet"),
        (
            lambda a: a[:, :8],
            r"control image 0 has shape \(8, 16, 3\), expected \(16, 16, 3\); resize",
        ),
        (lambda a: a[0], r"control image 0 has shape \(16, 3\), expected \(16, 16, 3\)"),
        (
            lambda a: [a[0], 255 * a[1], a[2]],
            "control image 1 is from 0.0 to 255.0, expected 0 to 1; divide bytes by 255",
        ),
        (lambda a: 2 * a - 1, "control image 0 is from -1.0 to 1.0, expected 0 to 1"),
        (lambda a: np.nan * a, "control image 0 is from nan to nan, expected 0 to 1"),
        (
            lambda a: a[:2],
            "got 2 control images of scale 1.0 for 3 prompts; expected 1 or 3, of a finite scale",
        ),
        (lambda a: a[:0], "got 0 control images"),
    ],
)
def test_images_that_do_not_fit(model, images, change, match):
    images = images.copy()
    images[:, 0, 0], images[:, 0, 1] = 0, 1
    with pytest.raises(ValueError, match=match):
        model(["a", "b", "c"], control=change(images))


def test_by_command(files, model, images, tmp_path, capsys):
    for i, image in enumerate(images):
        Image.fromarray((255 * image + 0.5).astype(np.uint8)).save(tmp_path / f"{i}.png")
    arguments = [
        "--model",
        str(files / "sd"),
        "--controlnet",
        str(files / "control"),
        "--prompt=a cat",
        "--prompt=the dog",
    ]
    arguments += [
        "--num_steps=4",
        "--guidance_scale=5",
        "--batch_size=4",
        "--count=2",
        "--out",
        str(tmp_path / "out.png"),
    ]
    controls = ["--control", str(tmp_path / "0.png"), "--control", str(tmp_path / "1.png")]
    sample.run(sample.parse([*arguments, *controls, "--control_scale=0.5"]))
    made = Image.open(tmp_path / "out.png")
    assert "4 images in" in capsys.readouterr().out
    ours = model(["a cat"] * 2 + ["the dog"] * 2, control=images[[0, 0, 1, 1]], control_scale=0.5)
    np.testing.assert_array_equal(np.asarray(made), pixels.grid(ours, 4))

    Image.new("RGBA", (16, 16)).save(tmp_path / "clear.png")
    with pytest.raises(ValueError, match=r"clear\.png has mode RGBA, expected RGB or grey"):
        sample.run(sample.parse([*arguments, "--control", str(tmp_path / "clear.png")]))


def change(path, **values):
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value != "gone"})
    )


def test_import(files, tmp_path):
    settings, tensors = diffusers.controlnet(files / "control")
    assert settings == dict(
        name="controlnet.controlnet",
        channels=4,
        attention=(True, False),
        num_heads=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        use_linear_projection=False,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 16),
    )
    path = sd.build_controlnet(tmp_path / "sd/controlnet")
    change(
        path,
        use_linear_projection="gone",
        global_pool_conditions="gone",
        conditioning_channels="gone",
    )  # as in the first configs
    again, others = diffusers.controlnet(tmp_path / "sd")
    assert again == settings and others.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (
            dict(controlnet_conditioning_channel_order="bgr"),
            "_channel_order is 'bgr', expected 'rgb'",
        ),
        (dict(global_pool_conditions=True), "global_pool_conditions is True, expected False"),
        (dict(conditioning_channels=4), "conditioning_channels is 4, expected 3"),
        (
            dict(_class_name="ControlNetXSAdapter"),
            "its controlnet is not supported: _class_name is 'ControlNetXSAdapter', expec",
        ),
        (
            dict(addition_embed_type="text_time", num_attention_heads=8),
            "_embed_type is 'text_time', .*num_attention_heads is 8, expected",
        ),
        (
            dict(mid_block_type="UNetMidBlock2D"),
            "mid_block_type is 'UNetMidBlock2D', expected 'UNetMidBlock2DCross",
        ),
        (dict(down_block_types=["DownBlock2D", "AttnDownBlock2D"]), "down_block_types is"),
        (
            dict(cross_attention_dim=[32, 16]),
            r"cross_attention_dim is \(32, 16\), expected one number",
        ),
        (
            dict(conditioning_embedding_out_channels="gone"),
            "conditioning_embedding_out_channels is missing",
        ),
    ],
)
def test_what_is_not_imported(files, tmp_path, values, match):
    path = tmp_path / "control"
    path.mkdir()
    for file in (files / "control").iterdir():
        (path / file.name).symlink_to(file) if file.suffix != ".json" else (
            path / file.name
        ).write_text(file.read_text())
    change(path, **values)
    with pytest.raises(ValueError, match=match):
        diffusers.controlnet(path)


def test_directories_that_do_not_fit(files, tmp_path):
    with pytest.raises(
        ValueError, match="has no controlnet/; expected a directory in the layout of diffusers"
    ):
        model_lib.load(files / "sd", controlnet=files / "sd")
    path = sd.build_controlnet(
        tmp_path / "other", block_out_channels=(16, 16), cross_attention_dim=24
    )
    with pytest.raises(
        ValueError,
        match=(
            r"_channels is \(16, 16\), the UNet's is \(16, 32\); cross_attention_dim is "
            r"24, the UNet's is 32"
        ),
    ):
        model_lib.load(files / "sd", controlnet=path)
    tensors = safetensors.numpy.load_file(path / "diffusion_pytorch_model.safetensors")
    tensors["more"] = tensors.pop("controlnet_mid_block.bias")
    network = controlnet.controlnet(
        **{key: value for key, value in diffusers.controlnet(path)[0].items() if key != "name"}
    )
    with pytest.raises(ValueError, match=r"missing controlnet_mid_block\.bias; unused more"):
        state_dict.from_torch(tensors, network.abstract)


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="attention has 1 values, expected 4"):
        controlnet.controlnet(attention=(True,))
    assert isinstance(make("sd2")[1], layers.Network)
