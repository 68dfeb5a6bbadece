"""configs/coco.py:tiny from a Stable Diffusion directory to one that diffusers opens."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dmd_jax import bench, convert, embed, experiment, export, main, metrics, sample, train
from dmd_jax.data import records
from dmd_jax.models import vgg
from dmd_jax.weights import convert as convert_lib

pytest.importorskip("diffusers")
from tests import sd

TEXTS = ("a red flower", "a temple in china", "the roof of a house", "petals and leaves", "a photo of trees", "blue sky")


def write_coco(path):
    """Crops of real photographs in COCO's layout: one is cut short, one is not there, one caption is empty."""
    from sklearn import datasets

    (path / "val2014").mkdir(parents=True)
    photographs = datasets.load_sample_images().images
    images, captions = [], []
    for i in range(24):
        name, top = f"COCO_val2014_{i:012d}.jpg", 13 * i
        file = io.BytesIO()
        Image.fromarray(photographs[i % 2][top : top + 64, 2 * top : 2 * top + 80]).save(file, "JPEG")
        data = file.getvalue()
        if i != 7:
            (path / "val2014" / name).write_bytes(data[: len(data) // 2] if i == 5 else data)
        images.append({"id": i, "file_name": name})
        captions.append({"id": 100 + i, "image_id": i, "caption": "  " if i == 9 else f"{TEXTS[i % 6]} number {i}"})
    (path / "annotations").mkdir()
    (path / "annotations/captions_val2014.json").write_text(json.dumps({"images": images, "annotations": captions}))
    good = [caption for caption in captions if caption["image_id"] not in (5, 7, 9)]
    (path / "annotations/good.json").write_text(json.dumps({"images": images, "annotations": good}))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("files")
    sd.build(path / "sd")
    sd.build(path / "with_taesd", tiny=True)
    shutil.copytree(path / "with_taesd/vae", path / "taesd")
    write_coco(path / "coco")
    (path / "prompts.txt").write_text("".join(f"{text}, {i}\n" for i in range(3) for text in TEXTS) + "long " * 100 + "\n")
    np.savez(path / "lpips.npz", **convert_lib.to_torch(vgg.make().init(0)))
    return path


def tiny(files):
    config = bench.load_config("coco:tiny")
    config.update(checkpoint=str(files / "sd"), coco=str(files / "coco"), taesd=str(files / "taesd"))
    config.prompts_file = str(files / "prompts.txt")
    config.dmd.recipe.distance.weights = str(files / "lpips.npz")
    config.features = dict(name="efficientnet", size=32, batch_size=8)
    config.evaluate.reference.update(annotations=str(files / "coco/annotations/good.json"), size=16)
    config.mesh.data = 1
    return config


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("coco")
    config = tiny(files)
    with pytest.warns(UserWarning, match=r"1 captions are longer than the encoder reads, and were cut.*long long"):
        main.run(config, workdir)
    return config, workdir
