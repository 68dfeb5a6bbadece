"""The smallest run with all kinds of stages; a config for tests that start processes."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # a config is loaded as a file

from configs import digits
from dmd_jax.experiment import settings


def get_config():
    config = digits.get_config("smoke_instaflow")
    config.stages = ("teacher", "pairs", "direct", "evaluate")
    config.network.update(width=4, multipliers=(1,), attention=())
    config.teacher.update(
        num_steps=20, log_every=1, checkpoint_every=10, keep_checkpoints=1000, batch_size=16
    )
    config.teacher.sampler.num_steps = 3
    config.direct.update(num_steps=10, preview_every=10, preview_images=64)
    config.pairs.shard_size = 8
    del config.evaluate.others
    config.evaluate.student = "direct"
    config.evaluate.straightness.update(stages=("teacher",), num_steps=3, count=32)
    return settings.complete(config)
