"""The stage that turns captions, and images where there are any, into what the networks take: embeddings of the text, and latents.

Rows that cannot be read (a damaged image, an image that is not there, an empty caption) are left out, counted and listed.
"""

import math
import pathlib
import warnings

import ml_collections
import numpy as np
import tqdm

from dmd_jax import experiment, latents, metrics
from dmd_jax.data import captions, records

NULL = "null.npy"  # the embedding of the empty text


def done(config: ml_collections.ConfigDict, stage: str, workdir: pathlib.Path) -> bool:
    """Whether every shard is there, of the captions that the config names and by its encoders."""
    directory = workdir / stage
    if not (directory / records.MANIFEST).exists():
        return False
    manifest, *_ = _prepare(config, stage, workdir)
    records.claim(directory, manifest)
    found = records.read_manifest(directory)
    return "count" in found and all(path.exists() for path in records.shard_paths(directory, found))


def run(config: ml_collections.ConfigDict, stage: str, workdir: pathlib.Path):
    """Writes the shards that are missing, the texts of all rows and the embedding of the empty text.

    Raises:
      ValueError: there is nothing to read, or the directory holds other captions.
    """
    settings, directory = config[stage], workdir / stage
    manifest, source, encoder, encode_images = _prepare(config, stage, workdir)
    records.claim(directory, manifest)
    np.save(directory / NULL, encoder.encode([""])[0].astype(settings.dtype))
    for i, path in tqdm.tqdm(enumerate(records.shard_paths(directory, manifest)), desc=stage, unit="shard", total=manifest["shards"]):
        if not path.exists():
            indices = range(i * settings.shard_size, min((i + 1) * settings.shard_size, len(source)))
            rows, skipped = _readable(source, indices)
            texts = [row["text"] for row in rows]
            arrays = {"cond": encoder.encode(texts).astype(settings.dtype)} if rows else {}
            if rows and encode_images:
                arrays["image"] = encode_images(np.stack([row["image"] for row in rows]))
            cut = [texts[k] for k in encoder.truncated(texts)]
            metrics.write_json(_told(path), {"texts": texts, "skipped": skipped, "truncated": cut})
            records.write_shard(path, arrays)
    _finish(directory, manifest)


def _finish(directory, manifest):
    """What the shards tell, in one place."""
    told = [metrics.read_json(_told(path)) for path in records.shard_paths(directory, manifest)]
    whole = {key: [item for shard in told for item in shard[key]] for key in ("texts", "skipped", "truncated")}
    if not whole["texts"]:
        raise ValueError(f"no row of the captions can be read; the first: {'; '.join(whole['skipped'][:3])}.")
    metrics.write_json(directory / records.TEXTS, whole)
    metrics.write_json(directory / records.MANIFEST, manifest | {"count": len(whole["texts"]), "skipped": len(whole["skipped"])})
    for key, what in (("skipped", "rows were left out"), ("truncated", "captions are longer than the encoder reads, and were cut")):
        if whole[key]:
            examples = "; ".join(whole[key][:3])
            warnings.warn(f"{len(whole[key])} {what}; all are in {directory / records.TEXTS}: {examples}", stacklevel=2)


def _prepare(config, stage, workdir):
    """The manifest, the captions, the encoder of text, and that of images or None."""
    settings = config[stage]
    source = experiment.open_source(settings.captions, workdir)
    parallel = experiment.make_parallel(config, stage)
    encoder = experiment.make_text_encoder(config, parallel)
    features = {"cond": {"shape": list(encoder.shape), "dtype": settings.dtype}}
    encode_images = None
    if settings.latents:
        encode_images = latents.make_encode(experiment.autoencoder(config), parallel, settings.batch_size)
        features["image"] = {"shape": list(experiment.image_shape(config)), "dtype": "float32"}
    manifest = {
        "shards": math.ceil(len(source) / settings.shard_size),
        "shard_size": settings.shard_size,
        "captions": repr(source),
        "rows": len(source),
        "encoder": encoder.digest,
        "autoencoder": config.autoencoder.to_dict() if settings.latents else None,
        "features": features,
    }
    return manifest, source, encoder, encode_images


def _readable(source, indices):
    """The rows that can be read, and why the others cannot."""
    rows, skipped = [], []
    for i in indices:
        try:
            rows.append(source[i])
        except captions.BadRow as error:
            skipped.append(f"row {i}: {error}")
    return rows, skipped


def _told(path):
    """What a shard cannot hold."""
    return path.with_suffix(".json")
