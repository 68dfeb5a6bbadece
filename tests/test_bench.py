"""The step in PyTorch does the same as ours, so it is an oracle of all of Algorithm 1.

The other benchmarks run at toy size.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import sharding
from dmd_jax.bench import __main__ as bench
from dmd_jax.bench import features, stable_diffusion
from dmd_jax.experiment import build, configs
from dmd_jax.models import clip_text, lpips, vae
from dmd_jax.plan import random_inputs
from dmd_jax.weights import state_dict
from tests import test_features
from tests.helpers.runs import smoke, stage_of

torch = pytest.importorskip("torch")

NETWORKS = {
    "unet_edm.ddpmpp": dict(width=8, attention=(8,)),
    "unet_edm.adm": dict(width=64, attention=(8,)),
}

TEXT_ENCODER = clip_text.clip(
    vocab_size=1000, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=1
)


def make_config(name, distance):
    config = smoke()
    config.mesh.data = 1
    config.network.update(name=name, num_blocks=1, **NETWORKS[name])
    config.dmd.recipe.distance = distance
    for optimizer in (config.dmd.recipe.optimizer, config.dmd.recipe.fake_score_optimizer):
        optimizer.update(warmup_steps=0, decay_steps=0, weight_decay=0.1, clip=0.3)
    return config


@pytest.mark.parametrize("name", NETWORKS)
def test_the_whole_step_is_pytorchs(name, tmp_path, monkeypatch):
    from dmd_jax.bench import torch_step

    distance = dict(name="squared_error")
    if name == "unet_edm.ddpmpp":
        np.savez(tmp_path / "lpips.npz", **state_dict.to_torch(lpips.make().init(0)))
        distance = dict(name="lpips", weights=str(tmp_path / "lpips.npz"), size=16)
    config = make_config(name, distance)
    recipe = build.recipe(
        stage_of(config, "dmd"), sharding.Parallel(sharding.make_mesh(data=1)), tmp_path
    )
    params, batch = (
        random_weights(stage_of(config, "teacher").network.abstract),
        random_inputs.random_batch(stage_of(config, "dmd"), 4),
    )
    state = recipe.init(params, recipe.others)
    drawn = []
    right = sharding.Parallel.split
    monkeypatch.setattr(
        sharding.Parallel, "split", lambda self, tree: drawn.append(tree) or right(self, tree)
    )
    step = jax.jit(
        lambda state, batch: (
            recipe.train_step(state, batch),
            drawn[-1]["fresh"] | drawn[-1]["noised"]["fresh"],
        )
    )
    (after, metrics), fresh = step(state, batch)

    other = torch_step.Step(stage_of(config, "dmd"), jax.device_get(state.frozen), batch)
    fresh = {k: torch.tensor(np.asarray(v)) for k, v in fresh.items() if k != "cond"}
    fresh = {k: v.permute(0, 3, 1, 2) if v.ndim == 4 else v for k, v in fresh.items()}
    for key, value in other.update(fresh).items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, err_msg=key)
    for ours, theirs in ((after.generator, other.generator), (after.fake_score, other.fake_score)):
        moved = state_dict.to_torch(jax.device_get(jax.tree.map(jnp.subtract, ours.params, params)))
        start = state_dict.to_torch(params)
        difference = [np.abs(moved[k] - (theirs[k].detach().numpy() - start[k])) for k in moved]
        size = np.concatenate([np.abs(m).ravel() for m in moved.values()])
        assert np.quantile(
            np.concatenate([d.ravel() for d in difference]), 0.99
        ) < 0.01 * np.median(size)


def random_weights(abstract):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: (0.2 * rng.standard_normal(a.shape)).astype(np.float32), abstract)


def test_a_config_that_does_not_exist():
    with pytest.raises(
        ValueError,
        match=r"no config cifar11.*; there are: cifar10, coco, digits, fashion_mnist, "
        r"imagenet64, twemoji\.",
    ):
        configs.load("cifar11")


@pytest.fixture
def toy():
    """configs/coco.py at a thousandth of its size."""
    config = configs.load("coco:tiny")
    config.mesh.data = 1
    config.network.update(block_out_channels=(16,), attention=(False,), norm_num_groups=8)
    return config


def test_the_unet_is_diffusers(toy):
    test_features.import_torchvision()  # diffusers does, too
    pytest.importorskip("diffusers")
    toy.network.update(block_out_channels=(16, 32), attention=(True, False))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = stable_diffusion.forward(
        stage_of(toy, "teacher"), batch_size=2, repeats=2, against="torch"
    )
    torch.set_num_threads(threads)
    assert found.difference < 1e-5
    assert found.parameters == sum(
        math.prod(a.shape) for a in jax.tree.leaves(stage_of(toy, "teacher").network.abstract)
    )
    assert len(found.seconds) == len(found.other[1]) == 2


def test_weights_at_random_are_nowhere_zero():
    params = random_inputs.random_params(TEXT_ENCODER.abstract)
    assert all(np.all(a != 0) and a.dtype == np.float32 for a in jax.tree.leaves(params))


def test_one_step_and_the_teacher_are_timed(toy):
    decoder = vae.kl(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)
    found = stable_diffusion.sample(
        stage_of(toy, "teacher"), TEXT_ENCODER, decoder, batch_size=1, teacher_steps=2, repeats=2
    )
    assert (found.calls, found.nfe) == (3, 5)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found[:4])


def test_one_unet_and_two_are_timed(toy, monkeypatch, capsys):
    decoder = vae.kl(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)
    found = stable_diffusion.stack(
        stage_of(toy, "teacher"), TEXT_ENCODER, decoder, batch_size=1, repeats=2
    )
    count = sum(
        math.prod(a.shape) for a in jax.tree.leaves(stage_of(toy, "teacher").network.abstract)
    )
    lacking = 4 * 16 * 9 + 16 + 2 * 16 + 16 * 4 * 9 + 4  # conv_in, conv_norm_out, conv_out
    assert found.parameters == (count, 2 * count - lacking)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found[:4])

    monkeypatch.setattr(
        stable_diffusion,
        "stack",
        lambda *_, **__: stable_diffusion.Stacked([1.0], [2.0], [5.0], [3.0], parameters=(7, 13)),
    )
    bench.stack(bench.parse(["stack", "--config=coco:tiny"]))
    printed = capsys.readouterr().out
    assert (
        "1.500 (1.500 to 1.500) times as long from text to image; the network alone 2.500"
        in printed
    )
    assert "two in series, 13 parameters: 5.000" in printed


@pytest.mark.parametrize(
    ("nfe", "images", "networks"), [(51, "34.667", "102.000"), (3, "2.667", "6.000")]
)
def test_the_ratio_is_that_of_whole_images(nfe, images, networks, monkeypatch, capsys):
    monkeypatch.setattr(
        stable_diffusion,
        "sample",
        lambda *_, **__: stable_diffusion.Sampled([1.0], [2.0], [12.0], [3.0], calls=3, nfe=nfe),
    )
    bench.sample(bench.parse(["sample", "--config=coco:tiny", "--teacher_steps=2"]))
    printed = capsys.readouterr().out
    assert ("the teacher's 51 calls are extrapolated from 3" in printed) == (nfe == 51)
    assert all(f"{value} ({value} to {value})" in printed for value in (images, networks))


@pytest.mark.parametrize(
    ("name", "module", "count"), [("inception", "pytorch_fid", 1), ("clip", "transformers", 2)]
)
def test_feature_networks_are_pytorchs(name, module, count, monkeypatch):
    """At their real size, with the same weights."""
    test_features.import_torchvision()
    pytest.importorskip(module)
    monkeypatch.setitem(features.VISION, "num_layers", 2)
    parallel = sharding.Parallel(sharding.make_mesh(data=1))
    monkeypatch.setattr(features.sharding, "Parallel", lambda _: parallel)
    found = features.features(name, count=count, size=0, batch_size=1, repeats=1, against="torch")
    assert found.difference < 1e-5 and len(found.seconds) == len(found.other) == 1


def test_images_a_second_and_the_ratio_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(
        features,
        "features",
        lambda *_, **__: features.Times([2.0, 4.0, 8.0], [8.0, 4.0, 2.0], 1e-7),
    )
    bench.features(bench.parse(["features", "--count=16", "--against=torch"]))
    printed = capsys.readouterr().out
    assert (
        "jax: 4.000 (2.000 to 8.000) images/s" in printed
        and "torch: 4.000 (2.000 to 8.000) images/s" in printed
    )
    assert (
        "jax is 1.000 (0.250 to 4.000) times as fast" in printed
        and "1.0e-07 of the largest feature" in printed
    )


def test_the_memory_of_statistics_is_told(capsys):
    bench.memory(bench.parse(["memory", "--count=40"]))
    assert "40 images of 32x32 pixels, 2048 features" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "forward --config=cifar10",
            "the network of cifar10 is unet_edm.ddpmpp, expected unet_sd.unet; use --config=coco.",
        ),
        ("forward --repeats=0", "repeats is 0 and batch_size 1; expected at least 1."),
        (
            "sample --config=twemoji",
            "twemoji takes its texts from wordllama, expected clip; use --config=coco.",
        ),
        (
            "stack --config=twemoji",
            "twemoji takes its texts from wordllama, expected clip; use --config=coco.",
        ),
        (
            "features --features=efficientnet --against=torch",
            "efficientnet has no counterpart in PyTorch here; leave --against out.",
        ),
        (
            "features --count=0",
            "expected --count, --batch_size and --repeats of at least 1, and --size of at least 0.",
        ),
        ("memory --count=1", "count is 1; expected at least 2."),
        (
            "step --config=coco:tiny --against=torch",
            "--against=torch knows the networks of unet_edm alone",
        ),
    ],
)
def test_what_cannot_be_measured(arguments, message):
    arguments = bench.parse(arguments.split())
    with pytest.raises(ValueError) as error:
        arguments.run(arguments)
    assert str(error.value).startswith(message)
