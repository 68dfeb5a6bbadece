"""The stage that turns captions into embeddings, and their images, if there are any, into latents.

Rows that cannot be read (a damaged or missing image, an empty caption) are left out, counted and
listed; too many are refused.
"""

import math
import warnings

import jax
import numpy as np
import tqdm

from dmd_jax.data import captions, records
from dmd_jax.encoders import autoencoder as autoencoder_lib
from dmd_jax.experiment import build, made
from dmd_jax.runtime import distributed, storage
from dmd_jax.weights import digests

NULL = "null.npy"  # the embedding of the empty text


def done(stage: build.Stage, workdir: storage.Path) -> bool:
    """Returns whether everything is there.

    Raises:
      ValueError: it was made of other captions or by other encoders than there are now.
    """
    directory = workdir / stage.name
    if not (directory / records.MANIFEST).exists():
        return False
    source, encoder, autoencoder = _prepare(stage, workdir)
    made.check(stage, workdir, _made(stage, workdir, source, encoder, autoencoder))
    manifest = records.read_manifest(directory)
    whole = (directory / NULL).exists() and (directory / records.TEXTS).exists()
    return whole and "count" in manifest and not records.missing_shards(directory, manifest)


def run(stage: build.Stage, workdir: storage.Path):
    """Writes the missing shards, the texts of all rows and the embedding of the empty text.

    Every process makes some of the shards, on its own devices.

    Raises:
      ValueError: too many rows cannot be read, the images do not fit the network, or the directory
        holds what was made from other things.
    """
    settings = stage.settings
    directory = workdir / stage.name
    source, encoder, autoencoder = _prepare(stage, workdir)
    encode_images = None
    if settings.latents:
        encode_images = autoencoder_lib.make_encode(
            stage.run.autoencoder, build.local_parallel(stage), settings.batch_size
        )
    everything = _made(stage, workdir, source, encoder, autoencoder)
    begun = (directory / records.MANIFEST).exists()
    if begun:
        made.check(stage, workdir, everything)
    manifest = {
        "shards": math.ceil(len(source) / settings.shard_size),
        "made": made.digest(everything),
        "features": _features(stage, encoder),
    }
    paths, skipped = records.shard_paths(directory, manifest), []
    for first in tqdm.tqdm(
        range(0, len(paths), jax.process_count()),
        desc=stage.name,
        unit="shard",
        disable=jax.process_index() > 0,
    ):
        i = first + jax.process_index()
        rows, bad = (
            _read(source, paths[i], i, settings.shard_size) if i < len(paths) else (None, [])
        )
        skipped += bad
        _refuse_if_many(skipped, len(source), directory)
        if rows is None:
            continue
        texts = [row["text"] for row in rows.values()]
        arrays = {"cond": encoder.encode(texts).astype(settings.dtype)} if rows else {}
        if rows and encode_images:
            arrays["image"] = _encode_images(
                encode_images, rows, manifest["features"]["image"]["shape"], stage.name
            )
        if not begun:  # not before the first shard is known to fit
            made.claim(stage, workdir, everything, begun=False)
            records.write_manifest(directory, manifest)
            begun = True
        cut = [texts[k] for k in encoder.truncated(texts)]
        storage.write_json(_sidecar(paths[i]), {"texts": texts, "skipped": bad, "truncated": cut})
        records.write_shard(paths[i], arrays)
    distributed.barrier("shards")
    if jax.process_index() == 0:
        _finish(directory, manifest, encoder.encode([""])[0].astype(settings.dtype))


def _read(source, path, i, shard_size):
    """The rows of shard i that can be read, or None if it is there, and why the others cannot."""
    if path.exists():
        return None, storage.read_json(_sidecar(path))["skipped"]
    return captions.readable(source, range(i * shard_size, min((i + 1) * shard_size, len(source))))


def _refuse_if_many(skipped, count, directory):
    """Refuses too many skipped rows, counted over all processes; what is written stays."""
    elsewhere = distributed.gather(len(skipped)).sum() - len(skipped)
    try:
        captions.refuse_if_many([*skipped, *["told by another process"] * elsewhere], count)
    except ValueError as error:
        raise ValueError(
            f"{error} Shards in {directory} stay; remove those whose .json names skipped rows, "
            "to make them again."
        ) from error


def _encode_images(encode, rows, shape, stage):
    """Latents [N, h, w, c] of images that all have the shape of the first."""
    first, *_ = rows.values()
    if "image" not in first:
        raise ValueError(
            f"{stage}: expected captions with images for latents, got texts alone; name the "
            "images, or set latents=False."
        )
    for i, row in rows.items():
        if row["image"].shape != first["image"].shape:
            others = f"{first['image'].shape} in row {next(iter(rows))}"
            got = f"{row['image'].shape} in row {i}, unlike {others}"
            raise ValueError(
                f"{stage}: expected images of one shape, got {got}; set {stage}.captions.size."
            )
    made = encode(np.stack([row["image"] for row in rows.values()]))
    if list(made.shape[1:]) != shape:
        got = f"{made.shape[1:]} of images {first['image'].shape}"
        raise ValueError(
            f"{stage}: expected latents {tuple(shape)} as the network's, got {got}; change "
            f"{stage}.captions.size."
        )
    return made


def _finish(directory, manifest, null):
    """What the shards tell, in one place."""
    told = [storage.read_json(_sidecar(path)) for path in records.shard_paths(directory, manifest)]
    whole = {
        key: [item for shard in told for item in shard[key]]
        for key in ("texts", "skipped", "truncated")
    }
    with storage.writing(directory / NULL) as file:
        np.save(file, null)
    storage.write_json(directory / records.TEXTS, whole)
    storage.write_json(
        directory / records.MANIFEST,
        manifest | {"count": len(whole["texts"]), "skipped": len(whole["skipped"])},
    )
    for key, what in (
        ("skipped", "rows were left out"),
        ("truncated", "captions are longer than the encoder reads, and were cut"),
    ):
        if whole[key]:
            examples = "; ".join(whole[key][:3])
            warnings.warn(
                f"{len(whole[key])} {what}; all are in {directory / records.TEXTS}: {examples}",
                stacklevel=2,
            )


def _prepare(stage, workdir):
    """The captions, the encoder of text, and what tells the autoencoder from others."""
    settings = stage.settings
    source = build.open_source(settings.captions, workdir)
    encoder = build.text_encoder(stage.run, build.local_parallel(stage))
    if not settings.latents:
        return source, encoder, None
    if stage.run.autoencoder is None or settings.batch_size is None:
        raise ValueError(
            f"{stage.name}: latents need config.autoencoder and {stage.name}.batch_size, the "
            "images encoded at once; set them, or latents=False."
        )
    _, params = autoencoder_lib.load(stage.run.autoencoder)
    return source, encoder, stage.run.autoencoder | {"checkpoint": digests.of_params(params)}


def _made(stage, workdir, source, encoder, autoencoder):
    more = {"rows": len(source), "encoder": encoder.digest, "autoencoder": autoencoder}
    return made.of(stage, workdir, **more)


def _features(stage, encoder):
    features = {"cond": {"shape": list(encoder.shape), "dtype": stage.settings.dtype}}
    if stage.settings.latents:
        features["image"] = {"shape": list(stage.image_shape), "dtype": "float32"}
    return features


def _sidecar(path):
    """Returns the path of the JSON beside a shard."""
    return path.with_suffix(".json")
