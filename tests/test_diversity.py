import itertools

import jax
import numpy as np
import pytest

from dmd_jax import sharding
from dmd_jax.evals import diversity
from dmd_jax.models import lpips
from dmd_jax.weights import state_dict

IMAGES = np.random.default_rng(0).uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(file, its tensors)"""
    rng = np.random.default_rng(0)

    def draw(path, a):
        scale = 0.1 if path[-1].key == "bias" else (2 / np.prod(a.shape[:-1])) ** 0.5
        array = (scale * rng.standard_normal(a.shape)).astype(np.float32)
        return np.abs(array) if path[0].key.startswith("lin") else array

    tensors = state_dict.to_torch(jax.tree_util.tree_map_with_path(draw, lpips.make().abstract))
    path = tmp_path_factory.mktemp("lpips") / "lpips.npz"
    np.savez(path, **tensors)
    return path, tensors


@pytest.fixture(scope="module")
def measure(weights):
    return diversity.make(sharding.Parallel(sharding.make_mesh()), batch_size=8, weights=weights[0])


@pytest.fixture(scope="module")
def distances(weights):
    """By the package lpips, {(i, j): distance}."""
    torch = pytest.importorskip("torch")
    from tests import test_features

    test_features.import_torchvision()
    oracle = pytest.importorskip("lpips").LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for stage in oracle.net.children():
        for name, layer in stage.named_children():
            if isinstance(layer, torch.nn.MaxPool2d):
                setattr(stage, name, torch.nn.AvgPool2d(2, 2))
    for name, parameter in oracle.named_parameters():
        parameter.data = torch.from_numpy(
            np.array(
                weights[1][name if name.startswith("lin") else f"features.{name.split('.', 2)[2]}"]
            )
        )
    x = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        return {
            (i, j): oracle(x[i : i + 1], x[j : j + 1]).item()
            for i, j in itertools.combinations(range(len(x)), 2)
        }


def test_all_pairs(measure, distances):
    assert measure(IMAGES, 6, 0) == pytest.approx(np.mean(list(distances.values())), rel=1e-5)


def test_some_pairs_on_one_device_in_other_batches(weights, measure, distances):
    alone = diversity.make(
        sharding.Parallel(sharding.make_mesh(data=1)), batch_size=3, weights=weights[0]
    )
    assert alone.digest == measure.digest
    chosen = [tuple(pair) for pair in diversity.draw_pairs(4, 4, 3).tolist()]
    expected = pytest.approx(np.mean([distances[pair] for pair in chosen]), rel=1e-5)
    assert alone(IMAGES, 4, 3) == expected and measure(IMAGES, 4, 3) == expected


def test_bytes_and_copies(measure):
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    assert measure(images, 3, 0) == pytest.approx(
        measure((images / 127.5 - 1).astype(np.float32), 3, 0), rel=1e-6
    )
    assert measure(np.repeat(images[:1], 3, axis=0), 3, 0) == pytest.approx(0, abs=1e-12)


def test_the_digest_is_of_weights_and_size(weights, tmp_path, measure):
    path, tensors = weights
    other = tmp_path / "other.npz"
    np.savez(other, **tensors | {"lin0.model.1.weight": 2 * tensors["lin0.model.1.weight"]})
    parallel = sharding.Parallel(sharding.make_mesh())
    resized, others = (
        diversity.make(parallel, batch_size=8, weights=file, size=size).digest
        for file, size in ((path, 64), (other, None))
    )
    assert len({measure.digest, resized, others}) == 3


@pytest.mark.parametrize("count, pairs", [(2, 1), (5, 10), (5, 100), (40, 100), (1000, 300)])
def test_pairs_are_of_different_images_and_differ(count, pairs):
    drawn = diversity.draw_pairs(count, pairs, 0)
    there = count * (count - 1) // 2
    assert len(drawn) == len(set(map(tuple, drawn))) == min(pairs, there)
    assert (drawn[:, 0] < drawn[:, 1]).all() and drawn.min() >= 0 and drawn.max() < count


def test_the_seed_decides():
    drawn = [diversity.draw_pairs(40, 20, seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_pairs_are_drawn_evenly():
    places = np.concatenate([diversity.draw_pairs(30, 100, seed).ravel() for seed in range(100)])
    counts = np.bincount(places, minlength=30)
    assert abs(counts / counts.mean() - 1).max() < 0.2


def test_pairs_of_many_images():
    last = 40_000 * 39_999 // 2
    drawn = diversity.draw_pairs(40_000, 1000, 0)
    numbers = drawn[:, 1] * (drawn[:, 1] - 1) // 2 + drawn[:, 0]
    assert (np.diff(numbers) > 0).all() and numbers[-1] < last and drawn[:, 0].min() >= 0


def test_what_is_refused(measure, tmp_path):
    with pytest.raises(ValueError, match="at least 2 images and 1 pair, got 1 images and 5 pairs"):
        measure(IMAGES[:1], 5, 0)
    with pytest.raises(ValueError, match="at least 2 images and 1 pair, got 4 images and 0 pairs"):
        measure(IMAGES, 0, 0)
    parallel = sharding.Parallel(sharding.make_mesh())
    with pytest.raises(ValueError, match="does not exist"):
        diversity.make(parallel, batch_size=8, weights=tmp_path / "absent.npz")
