"""A package of the user's own has a method, a network, a sampler, data, a protocol and a metric."""

import sys

import pytest

from dmd_jax import __main__, lookup, main
from dmd_jax.experiment import configs
from dmd_jax.runtime import log
from tests.helpers import runs

FILES = {
    "method.py": """
import jax.numpy as jnp

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import recipes

STREAMS = {"pairs": ("noise", "image", "cond")}
PLOTTED = ("loss",)
METHOD = recipes.Method("absolute errors", "l1")


def make(denoiser, parallel, *, seed, null_cond, optimizer, ema_decay):
    generate = denoiser_lib.one_step(denoiser, denoiser.process)

    def loss(params, others, pairs):
        x = generate(params, pairs["noise"], pairs["cond"])
        return jnp.mean(jnp.abs(x - pairs["image"]))

    return recipes.single(
        denoiser, parallel, draw=lambda key, batch: batch["pairs"], loss=loss,
        seed=seed, optimizer=optimizer, ema_decay=ema_decay,
    )
""",
    "network.py": """
import jax
import jax.numpy as jnp
from flax import nnx

from dmd_jax.models import layers


class Net(nnx.Module):
    def __init__(self, size, channels, width, rngs):
        self.inside = nnx.Linear(size * size * channels + 1, width, rngs=rngs)
        self.outside = nnx.Linear(width, size * size * channels, rngs=rngs)

    def __call__(self, x, noise, cond):
        flat = jnp.concatenate([x.reshape(len(x), -1), noise[:, None]], axis=1)
        return self.outside(jax.nn.tanh(self.inside(flat))).reshape(x.shape)


def make(*, size, channels, num_classes, width):
    initializers = ((r"kernel$", layers.xavier_uniform()), (r"bias$", layers.zeros))
    return layers.functional(lambda rngs: Net(size, channels, width, rngs), initializers)
""",
    "sampler.py": """
from dmd_jax import samplers


def make(denoise, process, *, num_steps):
    return samplers.euler(denoise, process, num_steps=num_steps)
""",
    "source.py": """
import numpy as np


class Squares:
    def __init__(self, count):
        self.count = count
        self.digest = f"squares {count}"

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = -np.ones((4, 4, 1), np.float32)
        image[index % 3 : index % 3 + 2] = 1 - 1e-3 * (index % 7)
        return {"image": image, "cond": np.int32(index % 2)}


def make(*, count):
    return Squares(count)
""",
    "metric.py": """
import numpy as np


def make(real, generated):
    return {"brightness apart": float(np.abs(real.moments.mean - generated.moments.mean).mean())}
""",
    "protocol.py": """
from dmd_jax.evals import protocols


def make():
    return protocols.Protocol(
        name="squares", source="made up", count=24, quantisation="none",
        features={"name": "my_package.features"},
        reference={"source": "my_package.source", "count": 40},
        conditions={"source": "labels.every", "num_classes": 2},
    )
""",
    "features.py": """
from dmd_jax.features import Features


def make(parallel):
    return Features("pixels", "none", lambda images: images.reshape(len(images), -1))
""",
}
CONFIG = """
import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.plugins = ("my_package",)
    config.stages = ("teacher", "pairs", "student", "evaluate")
    config.network = dict(name="my_package.network", size=4, channels=1, num_classes=2, width=8)
    config.process = dict(name="EDM", sigma_data=0.5)
    config.prediction = "edm"
    config.null_cond = 2
    optimizer = dict(learning_rate=1e-3, warmup_steps=1)
    train = dict(program="train", batch_size=8, num_steps=4, log_every=2, checkpoint_every=4)
    config.teacher = dict(
        **train,
        recipe=dict(name="teacher", optimizer=optimizer, ema_decay=0.0, cond_dropout=0.0),
        sampler=dict(name="my_package.sampler", num_steps=2),
        data=dict(images=dict(source="my_package.source", count=40)),
    )
    config.pairs = dict(
        program="pairs", teacher="teacher", count=16, batch_size=8,
        conditions=dict(source="labels.every", num_classes=2),
    )
    config.student = dict(
        **train,
        recipe=dict(name="my_package.method", optimizer=optimizer, ema_decay=0.0),
        sampler=dict(name="one_step"),
        data=dict(pairs=dict(source="records.read", directory="{workdir}/pairs")),
        init_from="teacher",
    )
    config.evaluate = dict(
        program="evaluate", teacher="teacher", student="student", batch_size=8,
        protocol="my_package.protocol", metrics=("my_package.metric",),
    )
    return config
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    package = tmp_path / "my_package"
    package.mkdir()
    for name, text in ({"__init__.py": ""} | FILES).items():
        (package / name).write_text(text)
    (tmp_path / "my_config.py").write_text(CONFIG)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(lookup, "_plugins", set())
    yield configs.load(str(tmp_path / "my_config.py"))
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]


def test_a_config_runs_to_its_report_with_nothing_but_the_users_own_package(
    config, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    main.run(config, workdir)
    student = runs.result_of(workdir).row("student")
    assert student.scores["brightness apart"] > 0
    assert "FD-pixels" in student.scores and student.nfe == 1
    assert [row["step"] for row in log.read(workdir / "student")] == [2, 4]
    assert (workdir / "evaluate/report.png").exists()
    monkeypatch.setattr(lookup, "_plugins", set())
    sample = ["sample", f"--workdir={workdir}", "--label=1", f"--out={tmp_path / 'one.png'}"]
    with pytest.raises(SystemExit, match="--plugins=my_package of a command"):
        __main__.main(sample)
    __main__.main([*sample, "--plugins=my_package"])
    assert (tmp_path / "one.png").exists()


def test_two_evaluations_have_two_results(config, tmp_path):
    config.second = config.evaluate.copy_and_resolve_references()
    config.second.update(student="teacher", count=16)
    config.stages = (*config.stages, "second")
    workdir = tmp_path / "run"
    main.run(config, workdir)
    for name, count in (("evaluate", 24), ("second", 16)):
        result = runs.result_of(workdir, name)
        assert result.asked["protocol"]["count"] == count
        assert (workdir / name / "report.png").exists()


def test_a_name_that_the_package_does_not_have(config, tmp_path):
    config.student.recipe.name = "my_package.methd"
    with pytest.raises(ValueError, match=r"no module my_package\.methd"):
        main.run(config, tmp_path / "run")
