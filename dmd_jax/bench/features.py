"""Feature networks at their real size with random weights, beside the same in PyTorch, and the memory that statistics of many images take.

What is returned is printed by `bench.py`.
"""

import dataclasses
import io
import pathlib
import resource
import tempfile
import zipfile
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax.numpy as jnp
import numpy as np
from PIL import Image

from dmd_jax import features as features_lib
from dmd_jax import lookup, sharding
from dmd_jax.evals import protocols, references, suite
from dmd_jax.models import clip, efficientnet_lite, inception, layers
from dmd_jax.runtime import timing
from dmd_jax.weights import state_dict

DIMENSIONS, PROJECTION = 2048, 512  # of Inception's features, and of CLIP's
VISION = dict(
    image_size=224,
    patch_size=32,
    hidden_size=768,
    intermediate_size=3072,
    num_layers=12,
    num_heads=12,
    act="quick_gelu",
)
TEXT = dict(
    vocab_size=8,
    max_length=8,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=1,
    act="gelu",
)  # not used


class Network(NamedTuple):
    """A feature network.

    Attributes:
      network: with its parameters.
      apply: `(params, pixels [B, H, W, 3] of 0 to 255) -> features [B, D]`.
      size: of images, where none is given.
      torch: what makes the same in PyTorch of its tensors; None where there is none to compare with.
    """

    network: layers.Network
    apply: Callable
    size: int
    torch: Callable | None


def _inception():
    network = inception.make()
    return Network(
        network,
        lambda params, x: network.apply(params, inception.pytorch_fid_input(x)),
        32,
        _torch_inception,
    )


def _clip():
    network = clip.clip(projection_dim=PROJECTION, text=TEXT, vision=VISION)
    return Network(
        network,
        lambda params, x: network.bind(params).images(x / 127.5 - 1),
        VISION["image_size"],
        _torch_clip,
    )


def _efficientnet():
    network = efficientnet_lite.make()
    return Network(network, lambda params, x: network.apply(params, (x - 127) / 128), 64, None)


NETWORKS = {"inception": _inception, "clip": _clip, "efficientnet": _efficientnet}


class Found(NamedTuple):
    """What `features` found.

    Attributes:
      seconds: of each run of ours.
      other: of the one it was compared with; empty for none.
      difference: the largest, relative to the largest feature of the other.
    """

    seconds: list[float]
    other: list[float]
    difference: float


def features(
    name: str, *, count: int, size: int, batch_size: int, repeats: int, against: str
) -> Found:
    """The features of `count` images, bytes at random, and by PyTorch in turn with it if `against` is "torch".

    Args:
      name: of NETWORKS.
      count: images of a run.
      size: height and width; 0 for those that the network takes.
      batch_size: images at once, over all devices.
      repeats: runs that are timed, after one that is not.
      against: see above.

    Raises:
      ValueError: there is nothing to compare with, a package is missing, the sizes do not fit, or something is not finite.
    """
    found = NETWORKS[name]()
    if against and not found.torch:
        raise ValueError(f"{name} has no counterpart in PyTorch here; leave --against out.")
    params = found.network.init(0)
    parallel = sharding.Parallel(sharding.make_mesh())
    ours = features_lib.of_network(name, found.apply, params, parallel, batch_size)
    images = np.random.default_rng(0).integers(
        0, 256, (count, *[size or found.size] * 2, 3), np.uint8
    )
    output, functions, difference = ours.extract(images), [lambda: ours.extract(images)], 0.0
    if against:
        other = _torch(found.torch, params)
        functions.append(
            lambda: np.concatenate(
                [other(images[i : i + batch_size]) for i in range(0, count, batch_size)]
            )
        )
        expected = functions[1]()
        difference = float(np.abs(output - expected).max() / np.abs(expected).max())
    if not np.isfinite(output).all() or not np.isfinite(difference):
        raise ValueError("the features are not finite.")
    seconds, *others = timing.in_turn(functions, repeats)
    return Found(seconds, others[0] if others else [], difference)


def _torch(make, params):
    """`bytes [B, H, W, 3] -> features [B, D]`, both numpy, by `make(tensors) -> (module, pixels -> what the module takes, -> features)`."""
    try:
        import torch

        module, before, after = make(
            {name: torch.from_numpy(np.array(a)) for name, a in state_dict.to_torch(params).items()}
        )
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f'--against=torch needs other packages ({error}); run: pip install "dmd_jax[torch]"'
        ) from error
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, like JAX's default
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module.eval().to(device)

    @torch.inference_mode()
    def run(images):
        return (
            after(module(before(torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float())))
            .cpu()
            .numpy()
        )

    return run


def _torch_inception(tensors):
    """pytorch-fid's, which would fetch its weights."""
    import torch
    from pytorch_fid import inception as pytorch_fid

    tensors |= {"fc.weight": torch.zeros(1008, DIMENSIONS), "fc.bias": torch.zeros(1008)}
    with mock.patch.object(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: tensors):
        return (
            pytorch_fid.InceptionV3(),
            lambda pixels: pixels / 255,
            lambda found: found[0][:, :, 0, 0],
        )


def _torch_clip(tensors):
    """The image tower of transformers' CLIPModel."""
    import transformers

    names = dict(hidden_act="act", num_hidden_layers="num_layers", num_attention_heads="num_heads")
    settings = {
        name: VISION[names.get(name, name)]
        for name in ("image_size", "patch_size", "hidden_size", "intermediate_size", *names)
    }
    module = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**settings, projection_dim=PROJECTION)
    )
    module.load_state_dict({name: a for name, a in tensors.items() if name.startswith("vis")})
    return (
        module,
        lambda pixels: pixels / 127.5 - 1,
        lambda found: found.image_embeds / found.image_embeds.norm(dim=-1, keepdim=True),
    )


class Taken(NamedTuple):
    """What statistics took.

    Attributes:
      seconds: for all images.
      start: megabytes that the process had before.
      peak: the most that it had.
    """

    seconds: float
    start: float
    peak: float


def statistics(count: int) -> Taken:
    """What the statistics of `count` images of 32x32 pixels in a .zip take, by features of 2,048 dimensions that cost next to nothing."""
    weights = {
        "w": np.random.default_rng(0).standard_normal((32 * 32 * 3, DIMENSIONS)).astype(np.float32)
        / 1000
    }
    parallel = sharding.Parallel(sharding.make_mesh())
    network = features_lib.of_network(
        "cheap",
        lambda p, x: jnp.tanh(x.reshape(len(x), -1) @ p["w"]),
        weights,
        parallel,
        64 * parallel.mesh.size,
    )
    network.extract(np.zeros((1, 32, 32, 3), np.uint8))
    protocol = dataclasses.replace(protocols.find("edm50k"), reference_count=0)
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "images.zip")
        write_zip(path, count)
        source = lookup.open_source({"source": "folder.read", "path": str(path), "size": 32})
        start = (
            int(pathlib.Path("/proc/self/statm").read_text().split()[1])
            * resource.getpagesize()
            / 1e6
        )
        measuring = suite.Suite(protocol, network, parallel, None, None, {})
        seconds, found = timing.timed(
            lambda: references.collect_source(measuring, source, directory)
        )
    if found.count != count:
        raise ValueError(f"expected statistics of {count} images, got those of {found.count}.")
    return Taken(seconds, start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def write_zip(path: pathlib.Path, count: int):
    """PNG files of 32x32 pixels at random, in folders of a thousand."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(
                file, "PNG", compress_level=1
            )
            archive.writestr(f"{i // 1000:05d}/img{i:08d}.png", file.getvalue())
