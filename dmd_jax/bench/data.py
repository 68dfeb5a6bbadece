"""Benchmarks of the data alone: what one process reads in a second, beside what its devices need.

python -m dmd_jax.bench.data records --need=64
python -m dmd_jax.bench.data captions --need=64

`records` reads pairs of configs/coco.py (noise and latents 64x64x4, embeddings 77x768) as a training stage does. `captions` reads JPEG
files of COCO's kind as the stage does that embeds them. Both make their files first, and read them while they are still in memory: a disk
can only be slower. `--need` is what a step asks of one process: images a step, over its seconds, over the processes.
"""

import argparse
import io
import json
import os
import pathlib
import sys
import tempfile

import jax
import numpy as np
from PIL import Image

from dmd_jax import sharding
from dmd_jax.data import captions as captions_lib
from dmd_jax.data import pipeline
from dmd_jax.data import records as records_lib
from dmd_jax.runtime import timing

PAIR = {
    "noise": ((64, 64, 4), "float32"),
    "image": ((64, 64, 4), "float32"),
    "cond": ((77, 768), "float16"),
}
SHARD = 500  # rows
GRAIN, QUALITY = 12, 90  # of a photograph: its JPEG has about the 160 kB of COCO's


def write_records(directory: pathlib.Path, count: int):
    """Pairs at random, as records."""
    rng, shards = np.random.default_rng(0), -(-count // SHARD)
    features = {name: {"shape": shape, "dtype": dtype} for name, (shape, dtype) in PAIR.items()}
    manifest = {"shards": shards, "count": count, "features": features}
    records_lib.claim(directory, manifest)
    for i, path in enumerate(records_lib.shard_paths(directory, manifest)):
        n = min(SHARD, count - i * SHARD)
        arrays = {
            name: rng.standard_normal((n, *shape), np.float32).astype(dtype)
            for name, (shape, dtype) in PAIR.items()
        }
        records_lib.write_shard(path, arrays)


def write_captions(directory: pathlib.Path, count: int) -> dict:
    """JPEG files of noise, coarse and fine, of 640x480 and 480x640 pixels in COCO's layout: the arguments of `captions.coco`."""
    rng, images = (
        np.random.default_rng(0),
        [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(count)],
    )
    (directory / "images").mkdir()
    for i, image in enumerate(images):
        size = (640, 480) if i % 2 else (480, 640)
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse) + GRAIN * rng.standard_normal((size[1], size[0], 1), np.float32)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
        (directory / "images" / image["file_name"]).write_bytes(file.getvalue())
    annotations = [{"id": i, "image_id": i, "caption": f"photograph {i}"} for i in range(count)]
    (directory / "captions.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    return dict(annotations=str(directory / "captions.json"), images=str(directory / "images"))


def records(arguments: argparse.Namespace):
    """Times batches of records, from the files to the devices."""
    with tempfile.TemporaryDirectory() as directory:
        write_records(pathlib.Path(directory), arguments.count)
        stream = pipeline.Stream(records_lib.read(directory=directory), arguments.batch_size)
        parallel = sharding.Parallel(sharding.make_mesh())
        parallel.check_batch("batch_size", arguments.batch_size)
        loader = pipeline.batches(
            {"pairs": stream}, seed=0, start=0, sharding=parallel.batch_sharding
        )
        size = sum(a.nbytes for a in jax.tree.leaves(next(loader))) / arguments.batch_size
        steps = -(-arguments.count // arguments.batch_size)
        seconds = [
            timing.timed(lambda: [jax.block_until_ready(next(loader)) for _ in range(steps)])[0]
            for _ in range(arguments.repeats)
        ]
    rates = [steps * arguments.batch_size / s for s in seconds]
    _told("batches of records", "rows", rates, size, arguments.need)


def captions(arguments: argparse.Namespace):
    """Times JPEG files of 640x480 pixels with captions, decoded, cropped and resized, one after another and in threads."""
    with tempfile.TemporaryDirectory() as directory:
        source = captions_lib.coco(
            **write_captions(pathlib.Path(directory), arguments.count), size=arguments.size
        )
        size = (
            sum(path.stat().st_size for path in (pathlib.Path(directory) / "images").iterdir())
            / arguments.count
        )
        ways = {
            "one after another": lambda: [source[i]["image"] for i in range(arguments.count)],
            "in threads": lambda: captions_lib.readable(source, range(arguments.count)),
        }
        for name, read in ways.items():
            rates = [arguments.count / timing.timed(read)[0] for _ in range(arguments.repeats)]
            _told(name, "images", rates, size, arguments.need)


def _told(what, unit, rates, size, need):
    """`size` in bytes."""
    median = float(np.median(rates))
    print(
        f"{what}: {timing.spread(rates)} {unit} a second, {median * size / 1e6:.0f} MB/s; {size / 1e3:.0f} kB each"
    )
    if need:
        print(
            f"the devices need {need:g} {unit} a second: {what} gives {median / need:.2f} times that"
        )


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dmd_jax.bench.data", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(required=True)
    for run, count in ((records, 2000), (captions, 200)):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument(
            "--count", type=int, default=count, help="rows to be made, and read in each repeat"
        )
        command.add_argument("--repeats", type=int, default=3, help="to be timed")
        command.add_argument(
            "--need",
            type=float,
            default=0.0,
            help="rows a second that the devices of one process take; 0 = not told",
        )
        if run is records:
            command.add_argument("--batch_size", type=int, default=32, help="of the process")
        else:
            command.add_argument("--size", type=int, default=512, help="of the images, in pixels")
    return parser.parse_args(argv)


def main():
    arguments = parse(sys.argv[1:])
    for name in ("count", "repeats", "batch_size", "size"):
        if getattr(arguments, name, 1) < 1:
            sys.exit(f"error: {name} is {getattr(arguments, name)}; expected at least 1.")
    print(f"{timing.devices()}, {os.cpu_count()} cores")
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
