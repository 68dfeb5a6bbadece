"""Runs of configs/digits.py:smoke."""

import jax

from dmd_jax import bench, experiment


def smoke():
    return bench.load_config("digits:smoke")


def params_of(config, workdir, stage, step=None):
    return jax.device_get(experiment.load_params(config, f"{{workdir}}/{stage}", workdir, step))
