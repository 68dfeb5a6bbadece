"""The step in PyTorch that ours is timed against does the same: an oracle of the whole of Algorithm 1. The rest at toy size."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import bench, bench_parts, bench_sd, experiment, sharding, train
from dmd_jax.models import clip_text, vae, vgg
from dmd_jax.weights import convert
from tests import test_features
from tests.runs import smoke

torch = pytest.importorskip("torch")

NETWORKS = {
    "unet_edm.ddpmpp": dict(width=8, multipliers=(1, 2), attention=(4,)),
    "unet_edm.adm": dict(width=64, multipliers=(1, 1), attention=(4,)),
}

TEXT_ENCODER = clip_text.clip(vocab_size=1000, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=1)


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
    from dmd_jax import bench_torch

    distance = dict(name="squared_error")
    if name == "unet_edm.ddpmpp":
        np.savez(tmp_path / "lpips.npz", **convert.to_torch(vgg.make().init(0)))
        distance = dict(name="lpips", weights=str(tmp_path / "lpips.npz"), size=16)
    config = make_config(name, distance)
    recipe = experiment.make_recipe(config, "dmd", sharding.Parallel(sharding.make_mesh(data=1)), tmp_path)
    params, batch = random_weights(experiment.make_network(config).abstract), bench_parts.random_batch(config, "dmd", 4)
    state = recipe.init(params)
    drawn = []
    right = sharding.Parallel.split
    monkeypatch.setattr(sharding.Parallel, "split", lambda self, tree: drawn.append(tree) or right(self, tree))
    step = jax.jit(lambda state, batch: (recipe.train_step(state, batch), drawn[-1]["fresh"] | drawn[-1]["noised"]["fresh"]))
    (after, metrics), fresh = step(state, batch)

    other = bench_torch.Step(config, jax.device_get(state.frozen), batch)
    fresh = {k: torch.tensor(np.asarray(v)) for k, v in fresh.items() if k != "cond"}
    fresh = {k: v.permute(0, 3, 1, 2) if v.ndim == 4 else v for k, v in fresh.items()}
    for key, value in other.update(fresh).items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, err_msg=key)
    for ours, theirs in ((after.generator, other.generator), (after.fake_score, other.fake_score)):
        moved = convert.to_torch(jax.device_get(jax.tree.map(jnp.subtract, ours.params, params)))
        start = convert.to_torch(params)
        difference = [np.abs(moved[k] - (theirs[k].detach().numpy() - start[k])) for k in moved]
        size = np.concatenate([np.abs(m).ravel() for m in moved.values()])
        assert np.quantile(np.concatenate([d.ravel() for d in difference]), 0.99) < 0.01 * np.median(size)


def random_weights(abstract):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: (0.2 * rng.standard_normal(a.shape)).astype(np.float32), abstract)


def test_products_are_counted_with_their_repetitions():
    def program(x, kernel):
        x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, length=3)[0]
        return jax.jit(lambda x: jax.lax.conv(x[None, None], kernel, (1, 1), "SAME"))(x) + (x @ x)[None, None]

    found = bench_parts.products(jax.make_jaxpr(program)(jnp.ones((4, 4)), jnp.ones((1, 1, 3, 3))).jaxpr)
    assert sorted((p.name, n) for (p, *_), n in found.items()) == [("conv_general_dilated", 1), ("dot_general", 4)]


def test_a_config_that_does_not_exist():
    with pytest.raises(
        ValueError, match=r"no config .*cifar11\.py; there are: cifar10, coco, digits, fashion_mnist, imagenet64, twemoji\."
    ):
        bench.load_config("cifar11")


@pytest.fixture
def toy():
    """configs/coco.py at a thousandth of its size."""
    config = bench.load_config("coco:tiny")
    config.mesh.data = 1
    config.network.update(block_out_channels=(16,), attention=(False,), norm_num_groups=8)
    return config


def test_the_unet_is_diffusers(toy):
    test_features.import_torchvision()  # diffusers does, too
    pytest.importorskip("diffusers")
    toy.network.update(block_out_channels=(16, 32), attention=(True, False))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = bench_sd.forward(toy, batch_size=2, repeats=2, against="torch")
    torch.set_num_threads(threads)
    assert found.difference < 1e-5
    assert found.parameters == sum(math.prod(a.shape) for a in jax.tree.leaves(experiment.make_network(toy).abstract))
    assert len(found.seconds) == len(found.other[1]) == 2


def test_weights_at_random_are_nowhere_zero():
    params = bench_parts.random_params(TEXT_ENCODER.abstract)
    assert all(np.all(a != 0) and a.dtype == np.float32 for a in jax.tree.leaves(params))


def test_one_step_and_the_teacher_are_timed(toy):
    decoder = vae.kl(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)
    found = bench_sd.sample(toy, TEXT_ENCODER, decoder, batch_size=1, teacher_steps=2, repeats=2)
    assert (found.calls, found.nfe) == (3, 5)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found[:4])


def test_one_unet_and_two_are_timed(toy, monkeypatch, capsys):
    decoder = vae.kl(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)
    found = bench_sd.stack(toy, TEXT_ENCODER, decoder, batch_size=1, repeats=2)
    count = sum(math.prod(a.shape) for a in jax.tree.leaves(experiment.make_network(toy).abstract))
    lacking = 4 * 16 * 9 + 16 + 2 * 16 + 16 * 4 * 9 + 4  # conv_in, conv_norm_out, conv_out
    assert found.parameters == (count, 2 * count - lacking)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found[:4])

    monkeypatch.setattr(bench_sd, "stack", lambda *_, **__: bench_sd.Stacked([1.0], [2.0], [5.0], [3.0], parameters=(7, 13)))
    bench.stack(bench.parse(["stack", "--network=coco:tiny"]))
    printed = capsys.readouterr().out
    assert "1.500 (1.500 to 1.500) times as long from text to image; the network alone 2.500" in printed
    assert "two in series, 13 parameters: 5.000" in printed


@pytest.mark.parametrize(("nfe", "images", "networks"), [(51, "34.667", "102.000"), (3, "2.667", "6.000")])
def test_the_ratio_is_that_of_whole_images(nfe, images, networks, monkeypatch, capsys):
    monkeypatch.setattr(bench_sd, "sample", lambda *_, **__: bench_sd.Sampled([1.0], [2.0], [12.0], [3.0], calls=3, nfe=nfe))
    bench.sample(bench.parse(["sample", "--network=coco:tiny", "--teacher_steps=2"]))
    printed = capsys.readouterr().out
    assert ("the teacher's 51 calls are extrapolated from 3" in printed) == (nfe == 51)
    assert all(f"{value} ({value} to {value})" in printed for value in (images, networks))


def test_the_step_is_lowered_for_devices_that_are_not_there(toy, tmp_path, capsys, monkeypatch):
    bench_parts.write_files(toy, "dmd", tmp_path)
    toy.dmd.batch_size = 64
    toy.dmd.recipe.ema_decay = 0.5
    found = bench_sd.lower(toy, "dmd", tmp_path, devices=64, fsdp=8)
    assert '"data"=8, "fsdp"=8' in found.text and "64x77x32xf16" in found.text

    parallel = sharding.Parallel(sharding.make_mesh(data=1, fsdp=8))
    recipe, params = experiment.make_recipe(toy, "dmd", parallel, tmp_path), experiment.make_network(toy).init(0)
    state = train.first_state(recipe, params, train.abstract_state(recipe, params, parallel)[1])
    here = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state.replace(step=None)))
    parts = bench_sd.at_rest(found.state, 8)
    assert sum(parts.values()) + 8 == here  # but two counts of skipped updates
    whole, size = bench_sd.at_rest(found.state, 1), sum(a.nbytes for a in jax.tree.leaves(params))
    assert [whole[name] // size for name in ("generator", "fake score", "Adam", "running mean", "teacher")] == [1, 1, 4, 1, 1]

    monkeypatch.setattr(bench, "load_config", lambda name: toy)
    monkeypatch.setattr(bench_parts, "write_files", lambda *_: None)
    monkeypatch.setattr(bench_sd, "lower", lambda *_, **__: found)
    bench.lower(bench.parse(["lower", "--devices=64"]))
    assert "fsdp=64: " in capsys.readouterr().out


@pytest.mark.parametrize("stack", [1, 2])
@pytest.mark.parametrize("recipe", ["reflow", "distil"])
def test_other_stages_are_lowered(toy, tmp_path, recipe, stack):
    toy.flow = dict(program="train", process=dict(name="RectifiedFlow"), prediction="flow", network=dict(toy.network, stack=stack))
    toy.flow.recipe = dict(name=recipe, optimizer=dict(learning_rate=1e-6, warmup_steps=1), ema_decay=0.9)
    toy.flow.update(data=dict(pairs=dict(toy.dmd.data.pairs, batch_size=16)), batch_size=8)
    if recipe == "distil":
        toy.flow.recipe.distance = toy.dmd.recipe.distance
    toy.stages = (*toy.stages, "flow")
    bench_parts.write_files(toy, "flow", tmp_path)
    found = bench_sd.lower(toy, "flow", tmp_path, devices=8, fsdp=2)
    assert "16x77x32xf16" in found.text and "8x77x32xf16" not in found.text
    parts = bench_sd.at_rest(found.state, 1)
    names = {"generator", "Adam", "running mean"} | ({"lpips", "decoder"} if recipe == "distil" else set())
    assert {name for name, size in parts.items() if size} == names
    abstract = experiment.make_network(toy, "flow").abstract
    assert parts["generator"] == sum(4 * a.size for a in jax.tree.leaves(abstract)) and ("units" in abstract) == (stack > 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("forward --network=cifar10", "the network of cifar10 is unet_edm.ddpmpp, expected unet_sd.unet; use --network=coco."),
        ("forward --repeats=0", "repeats is 0 and batch_size 1; expected at least 1."),
        ("sample --network=twemoji", "twemoji takes its texts from wordllama, expected clip; use --network=coco."),
        ("stack --network=twemoji", "twemoji takes its texts from wordllama, expected clip; use --network=coco."),
        ("lower --network=coco:guidance8", "the config trains no stage 'dmd'; there are: dmd_1, dmd_2, "),
        ("lower --network=coco --stage=teacher", "the config trains no stage 'teacher'; there are: dmd."),
        ("lower --network=coco --fsdp=7", "devices 64 are not divisible by fsdp 7; change one of them."),
        ("step --network=coco:tiny --against=torch", "--against=torch knows the networks of unet_edm alone"),
    ],
)
def test_what_cannot_be_measured(arguments, message):
    arguments = bench.parse(arguments.split())
    with pytest.raises(ValueError) as error:
        arguments.run(arguments)
    assert str(error.value).startswith(message)
