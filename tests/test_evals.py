import numpy as np
import pytest

from dmd_jax.evals import frechet, kid, precision_recall

RNG = np.random.default_rng(0)
A = RNG.standard_normal((40, 5)).astype(np.float32)
B = (RNG.standard_normal((30, 5)) * 1.5 + 0.5).astype(np.float32)


def moments(features):
    return frechet.moments(frechet.sums(features))


def test_frechet_distance():
    cov_a, cov_b = np.cov(A.T.astype(np.float64)), np.cov(B.T.astype(np.float64))
    root_trace = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real).sum()
    mean = A.mean(0, dtype=np.float64) - B.mean(0, dtype=np.float64)
    expected = mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace
    assert frechet.frechet_distance(moments(A), moments(B)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_to_itself_is_zero():
    a = moments(A)
    assert frechet.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_with_fewer_images_than_features():
    few = RNG.standard_normal((4, 16)).astype(np.float32)
    stats = moments(few)
    assert frechet.frechet_distance(stats, stats) == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments(few[:1])


def test_sums_add_up():
    whole, parts = frechet.sums(A), frechet.sums(A[:7]) + frechet.sums(A[7:])
    assert whole.count == parts.count == 40
    np.testing.assert_allclose(parts.sum, whole.sum, rtol=1e-12)
    np.testing.assert_allclose(parts.outer, whole.outer, rtol=1e-12)
    assert whole.outer.dtype == np.float64


def test_kernel_distance():
    def kernel(x, y):
        return (np.dot(x.astype(np.float64), y) / 5 + 1) ** 3

    def mean_off_diagonal(x):
        return np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])

    expected = mean_off_diagonal(A) + mean_off_diagonal(B) - 2 * np.mean([kernel(a, b) for a in A for b in B])
    assert kid.kernel_distance(A, B) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_is_unbiased():
    same = [kid.kernel_distance(*RNG.standard_normal((2, 20, 5))) for _ in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(300)


def test_precision_recall():
    def distance(x, y):
        return np.linalg.norm(x.astype(np.float64) - y)

    def radius(x, points):
        return sorted(distance(x, p) for p in points)[3]

    inside_a = [[distance(a, b) <= radius(a, A) for a in A] for b in B]
    inside_b = [[distance(a, b) <= radius(b, B) for b in B] for a in A]
    expected = {
        "precision": np.mean([any(row) for row in inside_a]),
        "recall": np.mean([any(row) for row in inside_b]),
        "coverage": np.mean(np.any(inside_a, axis=0)),
    }
    assert precision_recall.precision_recall(A, B) == pytest.approx(expected)
    assert 0 < expected["precision"] < 1


def test_precision_recall_against_itself_and_against_something_far():
    assert precision_recall.precision_recall(A, A) == {"precision": 1, "recall": 1, "coverage": 1}
    assert precision_recall.precision_recall(A, A + 100) == {"precision": 0, "recall": 0, "coverage": 0}
