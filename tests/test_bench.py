"""The step in PyTorch that ours is timed against does the same: an oracle of the whole of Algorithm 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import bench, experiment, sharding
from dmd_jax.models import vgg
from dmd_jax.weights import convert
from tests.runs import smoke

torch = pytest.importorskip("torch")

NETWORKS = {
    "unet_edm.ddpmpp": dict(width=8, multipliers=(1, 2), attention=(4,)),
    "unet_edm.adm": dict(width=64, multipliers=(1, 1), attention=(4,)),
}


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
    params, batch = random_weights(experiment.make_network(config).abstract), bench.random_batch(config, 4)
    state = recipe.init(params)
    drawn = []
    right = sharding.Parallel.split
    monkeypatch.setattr(sharding.Parallel, "split", lambda self, tree: drawn.append(tree) or right(self, tree))
    step = jax.jit(lambda state, batch: (recipe.train_step(state, batch), drawn[-1]["fresh"]))
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

    found = bench.products(jax.make_jaxpr(program)(jnp.ones((4, 4)), jnp.ones((1, 1, 3, 3))).jaxpr)
    assert sorted((p.name, n) for (p, *_), n in found.items()) == [("conv_general_dilated", 1), ("dot_general", 4)]


def test_a_config_that_does_not_exist():
    with pytest.raises(ValueError, match=r"no config .*cifar11\.py; there are: cifar10, digits, fashion_mnist, imagenet64\."):
        bench.load_config("cifar11")
