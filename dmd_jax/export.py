"""Writes what a stage has trained in the layout that its teacher came in: a diffusers directory, or safetensors of EDM's keys.

python -m dmd_jax.export --workdir=/data/coco --stage=dmd --out=student
"""

import argparse
import pathlib
import sys

import ml_collections

from dmd_jax import experiment, metrics
from dmd_jax.weights import diffusers_write, edm


def export(workdir: pathlib.Path, stage: str, out: pathlib.Path, dtype: str = "float32", base_model: str = ""):
    """Raises ValueError if there is no such run or stage, or `out` cannot be written."""
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} is no run's directory: there is no {path}.")
    config = ml_collections.ConfigDict(metrics.read_json(path))
    params = experiment.load_params(config, f"{{workdir}}/{stage}", workdir)
    if config.network.name == "unet_sd.unet":
        diffusers_write.write(out, _directory(config, workdir), params, dtype=dtype, base_model=base_model or None)
    elif out.suffix != ".safetensors" or (out.exists() and not out.is_file()) or not out.parent.is_dir():
        raise ValueError(f"--out is {out}; expected a file that ends in .safetensors, in a directory that exists.")
    elif dtype != "float32":
        raise ValueError(f"--dtype is {dtype}; EDM's checkpoints are float32.")
    else:
        edm.write(out, params, config.network.to_dict())


def _directory(config, workdir):
    """The diffusers directory that the run started from."""
    for stage in config.stages:
        path = workdir / stage / experiment.SOURCE
        if path.exists() and (directory := metrics.read_json(path).get("directory")):
            return pathlib.Path(directory)
    raise ValueError(f"{workdir} did not start from a diffusers directory, whose autoencoder and text encoder an export needs.")


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
