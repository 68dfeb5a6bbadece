import numpy as np

from dmd_jax.evals import retrieval


def test_recall_counts_captions_among_the_nearest():
    gallery = np.eye(4)
    captions = ["apple", "pear", "plum", "pear"]
    features = np.array([[1, 0.1, 0, 0], [0, 0, 0.9, 0.8], [0.5, 0, 0, 2]])
    assert retrieval.recall(features, ["apple", "pear", "pear"], gallery, captions, ks=(1, 2)) == {"R@1": 2 / 3, "R@2": 1.0}
    assert retrieval.recall(10 * features, ["plum", "apple", "plum"], gallery, captions, ks=(1,)) == {"R@1": 0.0}


def test_recall_against_brute_force():
    rng = np.random.default_rng(0)
    gallery, features = rng.standard_normal((50, 8)), rng.standard_normal((30, 8))
    captions, wanted = [f"{i % 20}" for i in range(50)], [f"{i % 25}" for i in range(30)]
    hits = 0
    for f, text in zip(features, wanted, strict=True):
        cosines = [f @ g / np.linalg.norm(f) / np.linalg.norm(g) for g in gallery]
        hits += text in [captions[i] for i in sorted(range(50), key=lambda i: -cosines[i])[:10]]
    assert retrieval.recall(features, wanted, gallery, captions)["R@10"] == hits / 30
