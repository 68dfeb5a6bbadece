"""Writes what a stage has trained as safetensors, under the keys of EDM's checkpoints.

python -m dmd_jax.export --workdir=/tmp/digits --stage=dmd --out=student.safetensors
"""

import pathlib
import sys

import ml_collections
from absl import app, flags

from dmd_jax import experiment, metrics
from dmd_jax.weights import edm

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
STAGE = flags.DEFINE_string("stage", None, "The stage whose weights are wanted.", required=True)
OUT = flags.DEFINE_string("out", None, "The file to be written.", required=True)


def export(workdir: pathlib.Path, stage: str, out: pathlib.Path):
    """Raises ValueError if there is no such run or stage."""
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} is no run's directory: there is no {path}.")
    config = ml_collections.ConfigDict(metrics.read_json(path))
    edm.write(out, experiment.load_params(config, f"{{workdir}}/{stage}", workdir), config.network.to_dict())


def main(argv):
    try:
        export(pathlib.Path(WORKDIR.value).absolute(), STAGE.value, pathlib.Path(OUT.value))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
