"""Measures images in files, whoever has made them, by a named protocol.

python -m dmd_jax score --images=samples.zip --protocol=edm50k --reference=cifar10-32x32.npz
python -m dmd_jax score --images=samples --protocol=coco2014_30k --reference=coco/val2014
python -m dmd_jax score --images=samples --protocol=digits --out=scores.json

docs/evaluation.md has the protocols, what they need, and what they pin.
"""

import argparse
import dataclasses
import hashlib
import inspect

from dmd_jax import commands, lookup, sharding
from dmd_jax.data import folder
from dmd_jax.evals import protocols, references, report
from dmd_jax.evals import result as result_lib
from dmd_jax.evals import suite as suite_lib
from dmd_jax.runtime import storage
from dmd_jax.weights import published


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = commands.parser("score", __doc__)
    add = parser.add_argument
    add("--images", required=True, help="a directory or a .zip")
    add("--protocol", required=True, help=f"one of {', '.join(protocols.PROTOCOLS)}")
    add(
        "--reference",
        default="",
        help="real images (a directory or a .zip), or their statistics (an .npz)",
    )
    add(
        "--count",
        type=int,
        help="another number of images than the protocol's; the first ones by name",
    )
    add(
        "--captions",
        default="",
        help="a text file with a caption a line, in the order of the images' names",
    )
    add(
        "--clip",
        default="",
        help="the directory of the CLIP model, for the CLIP score of --captions",
    )
    add("--lpips", default="", help="the file of LPIPS' weights, for the mean distance of pairs")
    add(
        "--weights",
        default="",
        help=f"the file of the feature network; {published.INCEPTION} for FID, if not given",
    )
    add("--batch_size", type=int, default=64, help="images at once, over all devices")
    add("--out", default="", help="the result, a .json")
    add(
        "--save_statistics",
        default="",
        help="an .npz of --images (the first range of seeds) for --reference, pytorch-fid and EDM",
    )
    commands.add_plugins(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> result_lib.Result:
    """Measures, prints and writes.

    Returns:
      The result, as `--out` has it.

    Raises:
      ValueError: something is missing, damaged, of another size or mode, or too little.
    """
    protocol = protocols.find(arguments.protocol)
    for name, suffix in (("out", ".json"), ("save_statistics", ".npz")):
        path = getattr(arguments, name)
        if path and (
            not path.endswith(suffix) or not storage.has_parent(path) or storage.path(path).is_dir()
        ):
            raise ValueError(f"--{name} is {path}; expected a {suffix} in a directory that exists.")
    count = protocol.count if arguments.count is None else arguments.count
    source = _images(protocol, arguments.images, count)
    texts = _captions(arguments, len(source))
    suite = _suite(protocol, sharding.Parallel(sharding.make_mesh()), arguments)
    cache = storage.cache("statistics")
    statistics = arguments.reference if arguments.reference.endswith(".npz") else ""
    images = None
    if not statistics:
        images = _real(protocol.name, protocol.reference, arguments.reference, source)
    real = references.reference(suite, images, statistics, cache)
    held_out = None
    if protocol.floor:
        held_out = _real(protocol.name, protocol.floor, arguments.reference, source)
    asked = {
        "protocol": dataclasses.asdict(protocol) | {"count": count},
        "images": {"path": arguments.images, "digest": references.content(source)},
        "reference": arguments.reference,
        "captions": hashlib.sha256("\n".join(texts).encode()).hexdigest() if texts else None,
    }

    def keep(collected):
        if arguments.save_statistics:
            references.write(arguments.save_statistics, suite, collected)

    result = suite_lib.evaluate(
        suite,
        real,
        [(result_lib.Row(name="images"), lambda r: _batches(protocol, source, r, texts))],
        count=count,
        ranges=protocol.ranges,
        floor=references.floor(suite, real, held_out, cache),
        asked=asked,
        keep=keep,
    )
    if arguments.out:
        storage.write_json(storage.path(arguments.out), result.to_json())
    print(report.scores_table(result))
    return result


def _images(protocol, path, count):
    """The source of the images, at least as many as the protocol wants."""
    source = (
        folder.cropped(path=path, size=protocol.crop_to)
        if protocol.crop_to
        else folder.read(path=path, size=None)
    )
    height = source[0]["image"].shape[0]
    if protocol.sizes and height not in protocol.sizes:
        raise ValueError(
            f"{path}: the images have {height}x{height} pixels, expected "
            f"{' or '.join(map(str, protocol.sizes))} for the protocol "
            f"{protocol.name}; choose another one."
        )
    if count < suite_lib.LEAST:
        raise ValueError(f"--count is {count}; expected at least {suite_lib.LEAST}.")
    needed = count * protocol.ranges
    if len(source) < needed:
        ranges = f", {count} of each of {protocol.ranges} ranges of seeds" * (protocol.ranges > 1)
        raise ValueError(
            f"{path} has {len(source)} images, but {protocol.name} measures {needed}{ranges}; make "
            "more of them, or give another --count, "
            "which then stands in the names of the scores."
        )
    return source


def _captions(arguments, count):
    if bool(arguments.captions) != bool(arguments.clip):
        raise ValueError("--captions and --clip belong together; give both, or none.")
    if not arguments.captions:
        return None
    try:
        lines = storage.local(arguments.captions).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--captions={arguments.captions} is no text file in UTF-8 ({error}); give one with a "
            "caption a line."
        ) from error
    texts = [line.strip() for line in lines if line.strip()]
    if len(texts) != count:
        raise ValueError(
            f"{arguments.captions} has {len(texts)} captions, but there are {count} images; give "
            "one line for each image."
        )
    return texts


def _suite(protocol, parallel, arguments):
    features = {"batch_size": arguments.batch_size, "weights": arguments.weights}
    if protocol.features["name"] == "inception":
        features["weights"] = arguments.weights or published.INCEPTION
    if protocol.features["name"] == "classifier":
        if arguments.weights:
            raise ValueError(
                f"the protocol {protocol.name} trains its features itself, expected no --weights; "
                "leave them out."
            )
        features = {
            "path": str(storage.cache("statistics") / f"{protocol.name.partition(':')[0]}.npz")
        }
    return suite_lib.make(
        protocol,
        parallel,
        features=features,
        clip=arguments.clip,
        lpips=arguments.lpips,
        batch_size=arguments.batch_size,
    )


def _real(protocol, settings, path, images):
    """The source of real images that a protocol has settings of, or that lie in `path`."""
    if not settings:
        if not path:
            raise ValueError(f"the protocol {protocol} needs a reference; give --reference.")
        return folder.read(path=path, size=images[0]["image"].shape[0])
    settings, parameters = (
        dict(settings),
        inspect.signature(lookup.find("data", settings["source"])).parameters,
    )
    if path and "path" not in parameters:
        raise ValueError(
            f"the protocol {protocol} has real images of its own, expected no --reference, got "
            f"{path}; leave it out."
        )
    if path:
        settings["path"] = path
    if "size" in parameters:
        settings.setdefault("size", images[0]["image"].shape[0])
    return lookup.open_source(settings)


def _batches(protocol, source, indices, texts):
    start = indices.start
    for batch in references.batches(protocol, source, indices):
        end = start + len(batch.images)
        yield batch._replace(labels=None, texts=texts and texts[start:end])
        start = end
