"""configs/twemoji.py:small with a network of toy size, from emoji to the report."""

import numpy as np
import pytest
from PIL import Image

from dmd_jax import main
from dmd_jax.data import records, twemoji
from dmd_jax.experiment import configs
from dmd_jax.experiment import model as model_lib
from tests.helpers import runs


def toy():
    config = configs.load("twemoji:small")
    config.mesh.data = 1
    config.network.update(
        block_out_channels=(8,), attention=(False,), norm_num_groups=4, num_heads=2
    )
    config.teacher.update(batch_size=8, num_steps=2, preview_every=0, checkpoint_every=2)
    config.teacher.sampler.num_steps = 2
    config.pairs.update(count=16, shard_size=16, batch_size=16)
    config.dmd.update(batch_size=8, num_steps=2, preview_every=0, checkpoint_every=2)
    config.evaluate.update(count=16, batch_size=16, timing_repeats=1)
    config.evaluate.retrieval.count = 24
    config.features.batch_size = 64
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("twemoji")
    main.run(toy(), workdir)
    return workdir


def test_every_stage_leaves_what_the_next_one_reads(workdir):
    source = records.read(directory=workdir / "captions")
    emoji = twemoji.make(split="train", size=16, categories=("Animals & Nature", "Food & Drink"))
    assert len(source) == len(emoji) == 256 and source.texts[7] == emoji[7]["text"]
    assert source[7]["image"].shape == (8, 8, 12) and source[7]["cond"].shape == (16, 256)
    np.testing.assert_array_equal(
        source[7]["image"][1, 2].reshape(2, 2, 3), emoji[7]["image"][2:4, 4:6]
    )
    assert len(records.read(directory=workdir / "held_out")) == 32


def test_the_report_says_whether_images_show_their_captions(workdir):
    result = runs.result_of(workdir)
    names = {f"R@{k} {kind}" for k in (1, 10) for kind in ("seen", "unseen")}
    for model in ("teacher", "dmd"):
        found = result.row(model).scores
        assert names <= found.keys() and all(0 <= found[name] <= 1 for name in names)
    assert runs.nfe_of(result) == {"teacher": 3, "dmd": 1}
    assert (
        Image.open(workdir / "evaluate/captions.png").size[0] > 800
        and (workdir / "evaluate/report.png").exists()
    )


def test_prompts_that_were_never_seen(workdir):
    model = model_lib.load(workdir, batch_size=8)
    images = model(["tiger", ""], seed=0)
    assert images.shape == (2, 16, 16, 3) and abs(images[0] - images[1]).max() > 0


def test_pictures_that_are_shown_name_their_licence():
    config = configs.load("twemoji")
    assert "CC-BY 4.0" in config.evaluate.retrieval.credit and "CC-BY 4.0" in twemoji.CREDIT
