"""Random numbers by name: no key is used twice in a step, and streams are independent."""

import collections

import jax
import numpy as np
import pytest

from dmd_jax import rng, sharding
from dmd_jax.data import pipeline
from dmd_jax.recipes import distil, dmd, reflow, teacher
from tests import test_recipes

TIED = dict(matched=("fresh", "pairs"))


class Drawn(Exception):
    pass


class Rows:
    """Row i is i."""

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return {"cond": np.int32(index)}


def orders(streams, seed=0, steps=3):
    """The rows of each stream, in the order of the batches."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches = pipeline.batches(streams, seed=seed, start=0, sharding=device)
    several = [next(batches) for _ in range(steps)]
    return {name: np.concatenate([b[name]["cond"] for b in several]) for name in streams}


@pytest.mark.parametrize("lengths", [(500, 500), (500, 400)])
def test_streams_are_shuffled_independently(lengths):
    streams = {
        name: pipeline.Stream(Rows(length), 100)
        for name, length in zip(("fresh", "pairs"), lengths, strict=True)
    }
    found = orders(streams)
    same = np.mean(found["fresh"] == found["pairs"])
    assert same < 0.03
    assert abs(np.corrcoef(found["fresh"], found["pairs"])[0, 1]) < 0.2
    assert len(set(found["fresh"].tolist())) == 300  # no row twice in an epoch


def test_the_order_of_a_stream_does_not_depend_on_the_others():
    stream = pipeline.Stream(Rows(100), 10)
    alone, beside = orders({"pairs": stream}), orders({"pairs": stream, "fresh": stream})
    np.testing.assert_array_equal(alone["pairs"], beside["pairs"])
    assert (orders({"pairs": stream}, seed=1)["pairs"] != alone["pairs"]).any()


def test_seeds_follow_from_their_names_alone():
    uses = [(0, "teacher", "order"), (0, "teacher", "steps"), (0, "dmd", "order"), (1, "dmd")]
    uses += [(0, "a", "bc"), (0, "ab", "c")]
    seeds = [rng.seed(*use) for use in uses]
    assert len(set(seeds)) == len(seeds) and seeds == [rng.seed(*use) for use in uses]
    assert all(0 <= seed < 2**32 for seed in seeds)
    key = jax.random.key(0)
    few, many = rng.keys(key, ("t", "eps")), rng.keys(key, ("z", "eps", "t"))
    assert all(few[name] == many[name] for name in few)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [(teacher, {}), (reflow, {}), (distil, {}), (dmd, {}), (dmd, TIED)],
    ids=["teacher", "reflow", "distil", "dmd", "dmd_both"],
)
def test_no_key_is_used_twice_in_a_step(monkeypatch, recipe, changes):
    """A key that was drawn from is not drawn from again, and not split or folded; and conversely.

    Keys of one name may be folded with different numbers.
    """
    used = collections.Counter()

    def watched(name, function):
        def call(key, *args, **kwargs):
            bits = jax.random.key_data(key).tobytes()
            what = "folded" if name == "fold_in" else "drawn"
            number = int(args[0]) if name == "fold_in" else None
            used[bits, what, number] += 1
            return function(key, *args, **kwargs)

        return call

    for name in ("normal", "uniform", "bernoulli", "randint", "split", "fold_in", "bits"):
        monkeypatch.setattr(jax.random, name, watched(name, getattr(jax.random, name)))

    def stop(*_):
        raise Drawn

    monkeypatch.setattr(sharding.Parallel, "split", stop)  # after everything is drawn
    made, _ = test_recipes.make(recipe, test_recipes.small, **changes)
    state = made.init(test_recipes.PARAMS, made.others)
    for step in range(2):
        with pytest.raises(Drawn):
            batch = test_recipes.make_batch(recipe, 0)
            made.train_step(state.replace(step=np.int32(step)), batch)
    folded = {bits for bits, what, _ in used if what == "folded"}
    drawn = {bits for bits, what, _ in used if what == "drawn"}
    top = jax.random.key_data(jax.random.key(0)).tobytes()  # folded with each step
    assert not folded & drawn
    repeated = [use for use, count in used.items() if count > 1 and use[0] != top]
    assert not repeated
    assert len(drawn) >= (0 if recipe is distil else 2)
