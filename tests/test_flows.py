"""What a config with several flows may not say."""

import sys

import ml_collections
import numpy as np
import pytest

from dmd_jax.experiment import build, configs
from tests.helpers.runs import check_of, smoke, stage_of


def flat(changes):
    config = configs.load("digits:smoke_instaflow")
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reflow_1.prediction": "flow"},
            "reflow_2.prediction is 'rectified', but it starts from reflow_1, whose is 'flow'; "
            "give both",
        ),
        ({"reflow_1.recipe.name": "reflw"}, "dmd_jax/recipes has no file 'reflw'"),
        (
            {"reflow_1.prediction": "rectifed"},
            "no prediction for RectifiedFlow 'rectifed' .did you mean 'rectified'",
        ),
        ({"evaluate.straightness.num_steps": 0}, "num_steps is 0; expected at least 1"),
    ],
)
def test_flows_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        check_of(flat(changes))


def test_more_that_cannot_work():
    for key, value, message in (
        (
            "distil",
            dict(network=dict(smoke().network, channels=3)),
            "distil.network.channels is 3, expected 1, as network has it",
        ),
        (
            "evaluate",
            dict(others=dict(real=dict(stage="distil", sampler=dict(name="one_step")))),
            "others.real has a name that is taken",
        ),
        (
            "evaluate",
            dict(others=dict(row=dict(stage="distil"))),
            "evaluate.others.row.sampler is missing",
        ),
        (
            "evaluate",
            dict(straightness=dict(stages=("distil",))),
            "evaluate.straightness.num_steps is missing.*straightness.count is missing",
        ),
        ("evaluate", dict(others=5), "evaluate.others is 5; expected a value of type dict"),
        (
            "reflow_1",
            dict(recipe=dict(name="reflow", foo=3)),
            "reflow_1.recipe does not fit: .*optimizer",
        ),
    ):
        config = configs.load("digits:smoke_instaflow").to_dict()
        config[key].update(value)
        with pytest.raises(ValueError, match=message):
            check_of(ml_collections.ConfigDict(config))


def test_a_stage_that_continues_needs_more_steps():
    config = configs.load("coco:instaflow")
    config.reflow_2.num_steps = config.reflow_1.num_steps
    with pytest.raises(
        ValueError,
        match=r"reflow_2\.num_steps is 70000, but reflow_1, which it continues, "
        "has 70000; give it more",
    ):
        check_of(config)


def test_a_stage_keeps_its_own_network_process_and_prediction():
    config = configs.load("coco:tiny_instaflow")
    assert (
        "units" in stage_of(config, "distil_1").network.abstract
        and "units" not in stage_of(config, "teacher").network.abstract
    )
    denoisers = {stage: stage_of(config, stage).denoiser for stage in ("teacher", "reflow_1")}
    assert {name: type(d.process).__name__ for name, d in denoisers.items()} == {
        "teacher": "VP",
        "reflow_1": "RectifiedFlow",
    }
    assert [d.prediction.__name__ for d in denoisers.values()] == ["eps", "flow_to_data"]
    flow = build.flow(stage_of(config, "teacher"))
    assert (
        type(flow.process).__name__ == "RectifiedFlow" and np.isfinite(flow.process.grid(3)).all()
    )


def test_eight_bits_are_missed_at_the_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match="eight bits need the package qwix"):
        check_of(configs.load("digits:smoke_instaflow"))
