import numpy as np

from dmd_jax.evals import retrieval


def test_recall_counts_captions_among_the_nearest():
    gallery = np.eye(4)
    captions = ["apple", "pear", "plum", "pear"]
    features = np.array([[1, 0.1, 0, 0], [0, 0, 0.9, 0.8], [0.5, 0, 0, 2]])
    assert retrieval.recall(features, ["apple", "pear", "pear"], gallery, captions, ks=(1, 2)) == {
        "R@1": 2 / 3,
        "R@2": 1.0,
    }
    assert retrieval.recall(
        10 * features, ["plum", "apple", "plum"], gallery, captions, ks=(1,)
    ) == {"R@1": 0.0}


def test_recall_against_brute_force():
    rng = np.random.default_rng(0)
    gallery, features = rng.standard_normal((50, 8)), rng.standard_normal((30, 8))
    captions, wanted = [f"{i % 20}" for i in range(50)], [f"{i % 25}" for i in range(30)]
    hits = 0
    for f, text in zip(features, wanted, strict=True):
        cosines = [f @ g / np.linalg.norm(f) / np.linalg.norm(g) for g in gallery]
        hits += text in [captions[i] for i in sorted(range(50), key=lambda i: -cosines[i])[:10]]
    assert retrieval.recall(features, wanted, gallery, captions)["R@10"] == hits / 30


def test_ties_go_to_the_first_and_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    gallery = np.repeat(rng.standard_normal((6, 5)), 3, axis=0)[rng.permutation(18)]
    features, captions = rng.standard_normal((23, 5)), [f"{i}" for i in range(18)]
    gallery *= rng.uniform(0.1, 10, (18, 1))  # equal directions, but for the last bits
    unit = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    order = [
        np.argsort(-np.round(unit @ (f / np.linalg.norm(f)), 9), kind="stable") for f in features
    ]
    for k in (1, 2, 4, 18, 30):
        wanted = [captions[row[min(k, 18) - 1]] for row in order]
        for block in (1, 7, 256):
            monkeypatch.setattr(retrieval, "BLOCK", block)
            found = retrieval.recall(
                features, wanted, gallery, captions, ks=tuple({1, max(k - 1, 1), k})
            )
            assert found[f"R@{k}"] == 1.0 and (k in (1, 30) or found[f"R@{k - 1}"] == 0.0)
