"""The data alone: how many rows one process reads in a second.

The files are made first and are still in memory when they are read: a disk can only be slower.
"""

import io
import json
import pathlib
import tempfile
from typing import NamedTuple

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
GRAIN = 12  # standard deviation of the noise of a pixel, 0 to 255; with QUALITY it makes JPEG files
QUALITY = 90  # of about the size of COCO's, 160 kB


class Rates(NamedTuple):
    """How fast rows are read.

    Attributes:
      name: of the way to read them.
      unit: what a row is called.
      per_second: rows a second, of each repeat.
      size: bytes of a row.
    """

    name: str
    unit: str
    per_second: list[float]
    size: float


def records(*, count: int, batch_size: int, repeats: int) -> Rates:
    """Times batches of records, from the files to the devices.

    Args:
      count: rows that are written, and read in each repeat.
      batch_size: rows of a batch.
      repeats: how often it is timed.

    Raises:
      ValueError: the devices cannot share such a batch.
    """
    with tempfile.TemporaryDirectory() as directory:
        write_records(pathlib.Path(directory), count)
        stream = pipeline.Stream(records_lib.read(directory=directory), batch_size)
        parallel = sharding.Parallel(sharding.make_mesh())
        parallel.check_batch("batch_size", batch_size)
        loader = pipeline.batches(
            {"pairs": stream}, seed=0, start=0, sharding=parallel.batch_sharding
        )
        size = sum(a.nbytes for a in jax.tree.leaves(next(loader))) / batch_size
        steps = -(-count // batch_size)

        def read():
            for _ in range(steps):
                jax.block_until_ready(next(loader))

        seconds = [timing.timed(read)[0] for _ in range(repeats)]
    rates = [steps * batch_size / s for s in seconds]
    return Rates("batches of records", "rows", rates, size)


def captions(*, count: int, size: int, repeats: int) -> list[Rates]:
    """Times JPEG files with captions, decoded, cropped and resized, in a loop and in threads.

    Args:
      count: files that are written, and read in each repeat.
      size: height and width of the images after resizing, in pixels.
      repeats: how often each way is timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        source = captions_lib.coco(**write_captions(directory, count), size=size)
        total = sum(path.stat().st_size for path in (directory / "images").iterdir())
        readers = {
            "one after another": lambda: [source[i]["image"] for i in range(count)],
            "in threads": lambda: captions_lib.readable(source, range(count)),
        }
        rates = {
            name: [count / timing.timed(read)[0] for _ in range(repeats)]
            for name, read in readers.items()
        }
    return [Rates(name, "images", values, total / count) for name, values in rates.items()]


def write_records(directory: pathlib.Path, count: int):
    """Writes `count` random pairs as records."""
    rng = np.random.default_rng(0)
    features = {name: {"shape": shape, "dtype": dtype} for name, (shape, dtype) in PAIR.items()}
    manifest = {"shards": -(-count // SHARD), "count": count, "features": features}
    records_lib.write_manifest(directory, manifest)
    for i, path in enumerate(records_lib.shard_paths(directory, manifest)):
        n = min(SHARD, count - i * SHARD)
        arrays = {
            name: rng.standard_normal((n, *shape), np.float32).astype(dtype)
            for name, (shape, dtype) in PAIR.items()
        }
        records_lib.write_shard(path, arrays)


def write_captions(directory: pathlib.Path, count: int) -> dict:
    """Writes JPEG files of coarse and fine noise, 640x480 and 480x640 pixels, in COCO's layout.

    Returns:
      The arguments of `captions.coco`.
    """
    rng = np.random.default_rng(0)
    names = [f"{i:012d}.jpg" for i in range(count)]
    (directory / "images").mkdir()
    for i, name in enumerate(names):
        width, height = (640, 480) if i % 2 else (480, 640)
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), np.uint8))
        coarse = coarse.resize((width, height), Image.Resampling.BICUBIC)
        fine = GRAIN * rng.standard_normal((height, width, 1), np.float32)
        pixels = (np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
        (directory / "images" / name).write_bytes(file.getvalue())
    annotations = [{"id": i, "image_id": i, "caption": f"photograph {i}"} for i in range(count)]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": annotations}
    path = directory / "captions.json"
    path.write_text(json.dumps(content))
    return {"annotations": str(path), "images": str(directory / "images")}
