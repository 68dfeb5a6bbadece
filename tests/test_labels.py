"""Labels without images."""

import numpy as np

from dmd_jax.data import labels as labels_lib
from tests.helpers.sources import check_in_pipeline


def test_random_labels():
    source = labels_lib.random(num_classes=10, count=5000, seed=1)
    cond = np.array([source[i]["cond"] for i in range(len(source))])
    assert len(cond) == 5000 and cond.dtype == np.int32
    assert np.bincount(cond, minlength=10).min() > 400 and np.bincount(cond).shape == (10,)
    shorter, other = (
        labels_lib.random(num_classes=10, count=9, seed=1),
        labels_lib.random(num_classes=10, count=5000, seed=2),
    )
    assert [shorter[i]["cond"] for i in range(9)] == list(cond[:9])
    assert np.mean([other[i]["cond"] == cond[i] for i in range(5000)]) < 0.15
    check_in_pipeline(shorter)


def test_random_labels_are_independent_of_the_noise():
    """sampling.noise has the same key."""
    source = labels_lib.random(num_classes=10, count=2000, seed=1)
    noise = [
        np.random.Generator(np.random.Philox(key=[1, i])).standard_normal(4, np.float32)
        for i in range(2000)
    ]
    correlation = np.corrcoef(np.array(noise).T, [source[i]["cond"] for i in range(2000)])[-1, :-1]
    words = [np.random.Generator(np.random.Philox(key=[1, i])).integers(10) for i in range(2000)]
    assert abs(correlation).max() < 0.1
    assert np.mean([source[i]["cond"] == words[i] for i in range(2000)]) < 0.15
