"""Runs docs/your_teacher.md as it stands."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs/your_teacher.md").read_text()
SCRIPT, DDPM, SAVE, LARGER = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
KEEP_IMAGES = """
noise = dict(label=test["cond"], student=x, teacher=heun(params, test).reshape(-1, 2))
np.savez("images.npz", start=one_step(params, test).reshape(-1, 2), **noise)
"""
CHECK_SAVED = """
for saved, mean in zip(jax.tree.leaves(student), jax.tree.leaves(state.generator.ema), strict=True):
    np.testing.assert_array_equal(saved, mean)
"""
CHECK_RESTORED = """
assert int(state.step) == 2000
for saved, mean in zip(jax.tree.leaves(student), jax.tree.leaves(state.generator.ema), strict=True):
    np.testing.assert_array_equal(saved, mean)
state, metrics = train_step(state, batch)
assert int(state.step) == 2001 and int(metrics["skipped"]) == 0
"""
CHECK_DDPM = """
k = np.array([0, 500, 999])
x, eps = rng.standard_normal((2, 3, 1, 1, 2)).astype(np.float32)
_, target = ddpm.output_and_target(params, x, eps, jnp.float32(sigmas[k]), np.zeros(3, np.int32))
np.testing.assert_allclose(target, eps, atol=1e-3)
_, _, in_, timestep = ddpm_eps(ddpm.process, jnp.float32(sigmas[k]))
np.testing.assert_allclose(timestep, k, atol=1e-3)
np.testing.assert_allclose(in_, np.sqrt(abar[k]), rtol=1e-5)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The lines that the script printed, and images of its models from the same noise."""
    directory = tmp_path_factory.mktemp("your_teacher")
    parts = SCRIPT, KEEP_IMAGES, DDPM, CHECK_DDPM, SAVE, CHECK_SAVED, LARGER, CHECK_RESTORED
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    }
    process = subprocess.run(
        [sys.executable, "-c", "".join(parts)],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    with np.load(directory / "images.npz") as images:
        return process.stdout.splitlines(), dict(images)


def test_the_script_is_short():
    lines = SCRIPT.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100


def test_the_student_scores_as_its_teacher(run):
    (teacher, teacher_score), (student, student_score) = (line.split() for line in run[0])
    assert (teacher, student) == ("teacher", "student")
    assert float(teacher_score) < 0.006
    assert float(student_score) < 0.01  # the teacher in one step has 0.15


def errors(x, label):
    """Of the mean and the covariance of each half of the ring, whose exact values are known."""
    means, covariances = [], []
    for c, sign in ((0, 1), (1, -1)):
        points = x[label == c]
        mean = [0, sign * 0.7 * 2 / np.pi]
        variances = [0.7**2 / 2 + 0.05**2, 0.7**2 * (1 / 2 - 4 / np.pi**2) + 0.05**2]
        means.append(np.abs(points.mean(0) - mean).max())
        covariances.append(np.abs(np.cov(points.T) - np.diag(variances)).max())
    return max(means), max(covariances)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_mean_and_covariance_of_each_class_are_the_exact_ones(run, name):
    mean, covariance = errors(run[1][name], run[1]["label"])
    assert mean < 0.05 and covariance < 0.03


def test_the_student_makes_a_ring_all_around(run):
    x = run[1]["student"]
    radius = np.linalg.norm(x, axis=1)
    assert abs(radius.mean() - 0.7) < 0.03 and radius.std() < 0.13
    angles, _ = np.histogram(np.arctan2(x[:, 1], x[:, 0]), 16)
    assert angles.min() > 0.6 * len(x) / 16 and angles.max() < 1.6 * len(x) / 16


def test_the_start_is_poor(run):
    _, covariance = errors(run[1]["start"], run[1]["label"])
    assert covariance > 0.1
