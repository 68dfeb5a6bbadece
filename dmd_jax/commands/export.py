"""Writes the weights of a stage as a diffusers directory, or as safetensors with EDM's keys.

python -m dmd_jax export --workdir=/data/coco --stage=dmd --out=student
"""

import argparse
import dataclasses
import os
from typing import Any

from dmd_jax import commands
from dmd_jax.experiment import build
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import storage
from dmd_jax.weights import diffusers_write, edm


def export(
    workdir: str | os.PathLike,
    stage: str,
    out: str | os.PathLike,
    dtype: str = "float32",
    base_model: str = "",
):
    """Raises ValueError if there is no such run or stage, or `out` cannot be written."""
    workdir, out = storage.absolute(workdir), storage.path(out)
    stage = workdir_lib.read_run(workdir, stage)
    network = stage.model.network
    load = lambda: workdir_lib.load_params(stage, workdir)
    if network["name"] == "unet_sd.unet":
        teacher = workdir_lib.teacher_directory(stage, workdir)
        if teacher is None:
            raise ValueError(
                f"{workdir} did not start from a diffusers directory, whose autoencoder and text "
                "encoder an export needs."
            )
        if stage.settings.sampler["name"] != "one_step":
            raise ValueError(
                f"{stage.name!r} needs many steps; only a one-step generator is exported as a "
                "diffusers directory."
            )
        if (units := network.get("stack", 1)) > 1:
            raise ValueError(
                f"{stage.name!r} trained a stack of {units} UNets, for which diffusers has no "
                "class; export a stage that has one."
            )
        if stage.settings.program != "train":
            raise ValueError(
                f"{stage.name!r} has trained nothing; use the directory that it was imported from, "
                f"{teacher}."
            )
        method = build.method(stage).METHOD
        if method is None:
            raise ValueError(
                f"{stage.name!r} was trained by {stage.settings.recipe['name']}, which makes no "
                "one-step generator; export a student."
            )
        process: Any = stage.denoiser.process
        trained_for = {
            "process": {"name": type(process).__name__} | dataclasses.asdict(process),
            "prediction": stage.model.prediction,
        }
        options = dict(
            dtype=dtype,
            base_model=base_model or _teacher_name(stage),
            trained_for=trained_for,
            method=method,
        )
        diffusers_write.write(out, teacher, load(), **options)
    elif (
        out.suffix != ".safetensors"
        or (out.exists() and not out.is_file())
        or not storage.has_parent(out)
    ):
        raise ValueError(
            f"--out is {out}; expected a file that ends in .safetensors, in a directory that "
            "exists."
        )
    elif dtype != "float32":
        raise ValueError(f"--dtype is {dtype}; EDM's checkpoints are float32.")
    elif stage.model.process["name"] != "EDM":
        raise ValueError(
            f"{stage.name!r} has the process {stage.model.process['name']}, which EDM's "
            "checkpoints cannot say; export one of the process EDM."
        )
    else:
        edm.write(out, load(), network)


def _teacher_name(stage):
    """What the config calls the directory that the run has started from."""
    imported = [s.settings for s in stage.stages.values() if s.settings.program == "import_weights"]
    return imported[0].checkpoint


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = commands.parser("export", __doc__)
    parser.add_argument("--workdir", required=True, help="directory of a run")
    parser.add_argument("--stage", required=True, help="the stage whose weights are wanted")
    parser.add_argument(
        "--out",
        required=True,
        help="the directory to be written, or the file that ends in .safetensors",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=diffusers_write.DTYPES,
        help="of a directory's weights",
    )
    parser.add_argument(
        "--base_model", default="", help="what the model card of a directory calls the teacher"
    )
    commands.add_plugins(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace):
    """Writes what the command line asks for."""
    export(arguments.workdir, arguments.stage, arguments.out, arguments.dtype, arguments.base_model)
    print(arguments.out)
