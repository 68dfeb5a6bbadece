"""Writes what a stage has trained as safetensors, under the keys of EDM's checkpoints.

python -m dmd_jax.export --workdir=/tmp/digits --stage=dmd --out=student.safetensors
"""

import argparse
import pathlib
import sys

import ml_collections

from dmd_jax import experiment, metrics
from dmd_jax.weights import edm


def export(workdir: pathlib.Path, stage: str, out: pathlib.Path):
    """Raises ValueError if there is no such run or stage."""
    if out.suffix != ".safetensors" or (out.exists() and not out.is_file()) or not out.parent.is_dir():
        raise ValueError(f"--out is {out}; expected a file that ends in .safetensors, in a directory that exists.")
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} is no run's directory: there is no {path}.")
    config = ml_collections.ConfigDict(metrics.read_json(path))
    edm.write(out, experiment.load_params(config, f"{{workdir}}/{stage}", workdir), config.network.to_dict())


def main():
    parser = argparse.ArgumentParser(prog="python -m dmd_jax.export", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--stage", required=True, help="the stage whose weights are wanted")
    parser.add_argument("--out", required=True, help="the file to be written")
    arguments = parser.parse_args()
    try:
        export(pathlib.Path(arguments.workdir).absolute(), arguments.stage, pathlib.Path(arguments.out))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
