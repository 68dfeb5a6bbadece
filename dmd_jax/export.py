"""Writes what a stage has trained in the layout that its teacher came in: a diffusers directory, or safetensors of EDM's keys.

python -m dmd_jax.export --workdir=/data/coco --stage=dmd --out=student
"""

import argparse
import pathlib
import sys

from dmd_jax import experiment
from dmd_jax.weights import diffusers_write, edm


def export(workdir: pathlib.Path, stage: str, out: pathlib.Path, dtype: str = "float32", base_model: str = ""):
    """Raises ValueError if there is no such run or stage, or `out` cannot be written."""
    config, stage = experiment.read_run(workdir, stage)
    params = experiment.load_params(config, f"{{workdir}}/{stage}", workdir)
    if config.network.name == "unet_sd.unet":
        teacher = experiment.teacher_directory(config, workdir)
        if teacher is None:
            raise ValueError(f"{workdir} did not start from a diffusers directory, whose autoencoder and text encoder an export needs.")
        if config[stage].sampler.name != "one_step":
            raise ValueError(f"{stage!r} needs many steps; only a one-step generator is exported as a diffusers directory.")
        diffusers_write.write(out, teacher, params, dtype=dtype, base_model=base_model or config.checkpoint)
    elif out.suffix != ".safetensors" or (out.exists() and not out.is_file()) or not out.parent.is_dir():
        raise ValueError(f"--out is {out}; expected a file that ends in .safetensors, in a directory that exists.")
    elif dtype != "float32":
        raise ValueError(f"--dtype is {dtype}; EDM's checkpoints are float32.")
    else:
        edm.write(out, params, config.network.to_dict())


def main():
    parser = argparse.ArgumentParser(prog="python -m dmd_jax.export", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--stage", required=True, help="the stage whose weights are wanted")
    parser.add_argument("--out", required=True, help="the directory to be written, or the file that ends in .safetensors")
    parser.add_argument("--dtype", default="float32", choices=diffusers_write.DTYPES, help="of a directory's weights")
    parser.add_argument("--base_model", default="", help="what the model card of a directory calls the teacher")
    arguments = parser.parse_args()
    try:
        export(
            pathlib.Path(arguments.workdir).absolute(), arguments.stage, pathlib.Path(arguments.out), arguments.dtype, arguments.base_model
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
