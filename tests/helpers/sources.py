"""Files of images for tests of data sources, and what every source must fulfil."""

import io
import json
import pickle
import zipfile

import grain
import jax
import numpy as np
from PIL import Image

from dmd_jax.data import pipeline

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 4, 4, 3), np.uint8)
PIXELS[0, 0, 0] = (0, 255, 128)
LABELS = [3, 0, 1, 2, 2, 1]
NAMES = ["00000/a.png", "00000/b.PNG", "00001/c.webp", "00001/deep/er/d.png", "z.png", "zz.png"]


def encode(pixels, name="x.png"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(
        file,
        {"webp": "webp", "jpg": "jpeg"}.get(name[-4:].strip("."), "png"),
        **{"lossless": True} if "webp" in name else {},
    )
    return file.getvalue()


def photos():
    """{name: content} of a folder."""
    files = {name: encode(p, name) for name, p in zip(NAMES, PIXELS, strict=True)}
    files["dataset.json"] = json.dumps(
        {"labels": [*zip(NAMES, LABELS, strict=True)][::-1]}
    ).encode()
    return files | {"notes.txt": b"no image"}


def write(path, files):
    """A directory, or a .zip."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in reversed(files.items()):
                archive.writestr(name, content)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path


def check(source, pixels, labels):
    """Content, types and length."""
    items = [source[i] for i in range(len(source))]
    assert len(items) == len(labels)
    for item in items:
        assert (
            item["image"].dtype == np.float32
            and item["cond"].dtype == np.int32
            and item["cond"].shape == ()
        )
    np.testing.assert_allclose(
        np.stack([item["image"] for item in items]), pixels / 127.5 - 1, atol=1e-6
    )
    assert [int(item["cond"]) for item in items] == list(labels)
    assert abs(items[0]["image"]).max() <= 1


def check_in_pipeline(source):
    """Batches, the fingerprint, and reading by threads and by another process."""
    stream = {"images": pipeline.Stream(source, 4)}
    assert pipeline.fingerprint(stream, seed=0) == pipeline.fingerprint(stream, seed=0)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batch = next(pipeline.batches(stream, seed=0, start=3, sharding=sharding))["images"]
    assert batch["cond"].shape == (4,)
    rows = list(
        grain.MapDataset.source(source).to_iter_dataset(
            grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
        )
    )
    assert [r["cond"] for r in rows] == [source[i]["cond"] for i in range(len(source))]
    copy = pickle.loads(pickle.dumps(source))
    jax.tree.map(np.testing.assert_array_equal, copy[len(source) - 1], source[len(source) - 1])
