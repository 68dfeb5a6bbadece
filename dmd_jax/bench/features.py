"""Feature networks at their real size, with random weights.

They are timed beside the same networks in PyTorch. `statistics` measures the memory that the
statistics of many images take.
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

DIMENSIONS = 2048  # of Inception's features
PROJECTION = 512  # dimensions of CLIP's features
VISION = dict(
    image_size=224,
    patch_size=32,
    hidden_size=768,
    intermediate_size=3072,
    num_layers=12,
    num_heads=12,
    act="quick_gelu",
)
# CLIP's text tower, which is not used
TEXT = dict(
    vocab_size=8,
    max_length=8,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=1,
    act="gelu",
)


class Network(NamedTuple):
    """A feature network.

    Attributes:
      network: has the parameters.
      apply: `(params, pixels [B, H, W, 3] of 0 to 255) -> features [B, D]`.
      size: height and width of the images that it takes.
      torch: `tensors -> (module, preprocess, postprocess)`, the same network in PyTorch; None if
        there is none to compare with.
    """

    network: layers.Network
    apply: Callable
    size: int
    torch: Callable | None


def _inception():
    network = inception.make()
    apply = lambda params, x: network.apply(params, inception.pytorch_fid_input(x))
    return Network(network, apply, 32, _torch_inception)


def _clip():
    network = clip.clip(projection_dim=PROJECTION, text=TEXT, vision=VISION)
    apply = lambda params, x: network.bind(params).images(x / 127.5 - 1)
    return Network(network, apply, VISION["image_size"], _torch_clip)


def _efficientnet():
    network = efficientnet_lite.make()
    apply = lambda params, x: network.apply(params, (x - 127) / 128)
    return Network(network, apply, 64, None)


NETWORKS = {"inception": _inception, "clip": _clip, "efficientnet": _efficientnet}


class Times(NamedTuple):
    """Times of a feature network.

    Attributes:
      seconds: of each run of our network.
      other: seconds of the network that it is compared with; empty if there is none.
      difference: the largest difference, relative to the largest feature of the other network.
    """

    seconds: list[float]
    other: list[float]
    difference: float


def features(
    name: str, *, count: int, size: int, batch_size: int, repeats: int, against: str
) -> Times:
    """Times a feature network on random images, in turn with PyTorch's if `against` is "torch".

    Args:
      name: of NETWORKS.
      count: images of a run.
      size: height and width of the images; 0 for those that the network takes.
      batch_size: images at once, over all devices.
      repeats: runs that are timed, after one that is not.
      against: "torch" or "".

    Raises:
      ValueError: there is nothing to compare with, a package is missing, the sizes do not fit, or
        something is not finite.
    """
    candidate = NETWORKS[name]()
    if against and not candidate.torch:
        raise ValueError(f"{name} has no counterpart in PyTorch here; leave --against out.")
    params = candidate.network.init(0)
    parallel = sharding.Parallel(sharding.make_mesh())
    ours = features_lib.of_network(name, candidate.apply, params, parallel, batch_size)
    size = size or candidate.size
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    functions = [lambda: ours.extract(images)]
    output = ours.extract(images)
    difference = 0.0
    if against:
        extract_batch = _torch(candidate.torch, params)
        starts = range(0, count, batch_size)
        functions.append(
            lambda: np.concatenate([extract_batch(images[i : i + batch_size]) for i in starts])
        )
        expected = functions[1]()
        difference = float(np.abs(output - expected).max() / np.abs(expected).max())
    if not np.isfinite(output).all() or not np.isfinite(difference):
        raise ValueError("the features are not finite.")
    seconds = timing.in_turn(functions, repeats)
    return Times(seconds[0], seconds[1] if against else [], difference)


def _torch(make, params):
    """Returns `bytes [B, H, W, 3] -> features [B, D]`, both numpy, see `Network.torch`."""
    try:
        import torch

        arrays = state_dict.to_torch(params)
        module, preprocess, postprocess = make(
            {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}
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
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float()
        return postprocess(module(preprocess(pixels))).cpu().numpy()

    return run


def _torch_inception(tensors):
    """Makes pytorch-fid's network, without the weights that it would download."""
    import torch
    from pytorch_fid import inception as pytorch_fid

    tensors |= {"fc.weight": torch.zeros(1008, DIMENSIONS), "fc.bias": torch.zeros(1008)}
    with mock.patch.object(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: tensors):
        return (
            pytorch_fid.InceptionV3(),
            lambda pixels: pixels / 255,
            lambda outputs: outputs[0][:, :, 0, 0],
        )


def _torch_clip(tensors):
    """Makes the image tower of transformers' CLIPModel."""
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
        lambda output: output.image_embeds / output.image_embeds.norm(dim=-1, keepdim=True),
    )


class Cost(NamedTuple):
    """Time and memory of statistics.

    Attributes:
      seconds: for all images.
      start: megabytes of the process before.
      peak: largest number of megabytes of the process.
    """

    seconds: float
    start: float
    peak: float


def statistics(count: int) -> Cost:
    """Measures the statistics of `count` images of 32x32 pixels in a .zip.

    The features have 2,048 dimensions and cost next to nothing.
    """
    w = np.random.default_rng(0).standard_normal((32 * 32 * 3, DIMENSIONS)).astype(np.float32)
    apply = lambda params, x: jnp.tanh(x.reshape(len(x), -1) @ params["w"])
    parallel = sharding.Parallel(sharding.make_mesh())
    batch_size = 64 * parallel.mesh.size
    network = features_lib.of_network("cheap", apply, {"w": w / 1000}, parallel, batch_size)
    network.extract(np.zeros((1, 32, 32, 3), np.uint8))
    protocol = dataclasses.replace(protocols.find("edm50k"), reference_count=0)
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "images.zip")
        write_zip(path, count)
        source = lookup.open_source({"source": "folder.read", "path": str(path), "size": 32})
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        start = pages * resource.getpagesize() / 1e6
        cheap_suite = suite.Suite(protocol, network, parallel, None, None, {})
        seconds, reference = timing.timed(
            lambda: references.collect_source(cheap_suite, source, directory)
        )
    if reference.count != count:
        raise ValueError(f"expected statistics of {count} images, got those of {reference.count}.")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return Cost(seconds, start, peak)


def write_zip(path: pathlib.Path, count: int):
    """Writes random PNG files of 32x32 pixels, in folders of a thousand."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            file = io.BytesIO()
            image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
            image.save(file, "PNG", compress_level=1)
            archive.writestr(f"{i // 1000:05d}/img{i:08d}.png", file.getvalue())
