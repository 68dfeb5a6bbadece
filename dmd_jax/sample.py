"""Images from prompts or labels, by what a run has trained or by a diffusers directory.

python -m dmd_jax.sample --workdir=/data/coco --prompt="a photograph of an astronaut riding a horse" --out=astronaut.png

    from dmd_jax import sample
    model = sample.load("/data/coco")
    images = model(["a photograph of an astronaut riding a horse"], seed=0)     # [1, 512, 512, 3] float32 in [-1, 1]
"""

import argparse
import dataclasses
import functools
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from PIL import Image

from dmd_jax import experiment, latents, lookup, metrics, samplers, sampling, sharding, storage, text
from dmd_jax.models import controlnet as controlnet_lib
from dmd_jax.weights import convert, diffusers

PIPELINE = dict(name="pndm", num_steps=50, guidance_scale=7.5)  # what Stable Diffusion's own pipeline does


class Model(NamedTuple):
    """What makes images: `model(prompts, seed=0)`.

    Attributes:
      sampler: of the latents.
      sample: `(params, inputs) -> latents`.
      decode: `latents -> images`.
      params: of the network.
      encoder: of the prompts; None for a network of class labels.
      shape: of a latent.
      num_classes: of the labels.
      control_shape: of a control image; None without a ControlNet.
      seconds: what the last call took, per part; the first one compiles.
    """

    sampler: samplers.Sampler
    sample: Callable
    decode: Callable
    params: dict
    encoder: text.Encoder | None
    shape: tuple[int, int, int]
    num_classes: int
    control_shape: tuple[int, int, int] | None
    seconds: dict

    def __call__(
        self,
        prompts: Sequence[str] | Sequence[int],
        *,
        seed: int = 0,
        noise: np.ndarray | None = None,
        control: Sequence[np.ndarray] | None = None,
        control_scale: float = 1.0,
    ) -> np.ndarray:
        """Images [N, H, W, C] in [-1, 1], float32, of N prompts, or of N labels.

        Args:
          prompts: of text, or class labels.
          seed: image i follows from (seed, i), the weights and prompt i.
          noise: unit Gaussian [N, h, w, c] in place of the seed's.
          control: what the ControlNet is shown, RGB [H, W, 3] in [0, 1]: an image for each prompt, or one for all of them.
          control_scale: what its residuals are multiplied by; 0 is the UNet alone.

        Raises:
          ValueError: prompts, seed, noise or control do not fit.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"prompts is {prompts!r}; expected a list of at least one.")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed}; expected 0 to 2^32 - 1.")
        start = time.perf_counter()
        conditions = self._conditions(list(prompts), control, control_scale)
        encoded = time.perf_counter()
        inputs = sampling.inputs(seed, range(len(conditions)), self.shape, conditions)
        if noise is not None:
            if np.shape(noise) != inputs["z"].shape:
                raise ValueError(f"noise has shape {np.shape(noise)}, expected {inputs['z'].shape}.")
            inputs["z"] = np.asarray(noise, np.float32)
        made = self.sample(self.params, inputs)
        sampled = time.perf_counter()
        images = np.clip(self.decode(made), -1, 1)
        self.seconds.update(text=encoded - start, network=sampled - encoded, decoder=time.perf_counter() - sampled)
        return images

    def _cond(self, prompts):
        if self.encoder is None:
            labels = np.array(prompts)
            if labels.dtype.kind != "i" or labels.min() < 0 or labels.max() >= max(self.num_classes, 1):
                raise ValueError(f"expected labels from 0 to {max(self.num_classes, 1) - 1}, got {prompts}; this network knows no texts.")
            return labels.astype(np.int32)
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"expected texts, got {prompts}.")
        for i in self.encoder.truncated(prompts):
            warnings.warn(f"prompt {i} is longer than {self.encoder.shape[0]} tokens and is cut: {prompts[i][:60]!r}...", stacklevel=4)
        return self.encoder.encode(prompts)

    def _conditions(self, prompts, images, scale):
        """What the network is told of each prompt."""
        control, cond = self._control(len(prompts), images, scale), self._cond(prompts)
        cond = control | {"text": cond} if control else cond
        return [{"cond": jax.tree.map(lambda a, i=i: a[i], cond)} for i in range(len(prompts))]

    def _control(self, n, images, scale):
        """What the condition has beside the text of `n` prompts."""
        if self.control_shape is None:
            if images is not None or scale != 1:
                raise ValueError("control needs a ControlNet, expected none here; load the model with controlnet=directory.")
            return {}
        if images is None:
            raise ValueError(f"expected control, images {self.control_shape} for the ControlNet; give one, or load the model without it.")
        for i, image in enumerate(images):
            if np.shape(image) != self.control_shape:
                raise ValueError(f"control image {i} has shape {np.shape(image)}, expected {self.control_shape}; resize the images first.")
            if not (np.min(image) >= 0 and np.max(image) <= 1):
                raise ValueError(f"control image {i} is from {np.min(image)} to {np.max(image)}, expected 0 to 1; divide bytes by 255.")
        if len(images) not in (1, n) or not math.isfinite(scale):
            raise ValueError(f"got {len(images)} control images of scale {scale} for {n} prompts; expected 1 or {n}, of a finite scale.")
        control = np.asarray(images, np.float32)
        return {"control": np.broadcast_to(control, (n, *self.control_shape)), "scale": np.full(n, scale, np.float32)}


class Found(NamedTuple):
    """What a path holds; `make_model` makes a model of it, for any size of batches.

    Attributes:
      config: of the run, or of the directory.
      stage: of the config.
      sampler: settings.
      read: `parallel -> params`, on all its devices; they are read once for the same devices.
      controlnet: a directory, or nothing.
      quantize: "int8", or nothing.
    """

    config: ml_collections.ConfigDict
    stage: str
    sampler: dict
    read: Callable
    controlnet: str
    quantize: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a latent."""
        return experiment.image_shape(self.config)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return latents.image_shape(experiment.autoencoder(self.config), self.shape)

    @property
    def dtype(self) -> str:
        """Of the network."""
        return experiment.of_stage(self.config, self.stage, "network").dtype


def load(
    path: str,
    *,
    stage: str = "",
    batch_size: int = 1,
    dtype: str = "",
    sampler: dict | None = None,
    controlnet: str = "",
    quantize: str = "",
) -> Model:
    """The model of a run, or of a diffusers directory.

    Args:
      path: a workdir, a diffusers directory, or a name on the hub if huggingface_hub is installed.
      stage: of a workdir; the evaluation's student if not given.
      batch_size: images that are made at once; spread over as many devices as divide it.
      dtype: of the network; the config's, or float32, if not given.
      sampler: what differs from the stage's own settings, such as dict(num_steps=20) or dict(name="ddim", num_steps=50). Of a directory
        they are PIPELINE, or one step where `export` has written it or model_index.json names a RectifiedFlowPipeline: InstaFlow, from
        which a 2-rectified flow cannot be told: give it dict(name="euler", num_steps=25, guidance_scale=1.5).
      controlnet: the diffusers directory of a ControlNet, or its name on the hub.
      quantize: "int8" for weights and activations in eight bits.

    Raises:
      ValueError: nothing of the kind lies there, or settings do not fit.
    """
    return make_model(find(path, stage=stage, dtype=dtype, sampler=sampler, controlnet=controlnet, quantize=quantize), batch_size)


def find(
    path: str,
    *,
    stage: str = "",
    dtype: str = "",
    sampler: dict | None = None,
    controlnet: str = "",
    quantize: str = "",
) -> Found:
    """What `load` makes a model of, its weights yet to be read; see there for arguments and errors."""
    if quantize not in ("", "int8"):
        raise ValueError(f"quantize is {quantize!r}; expected 'int8' or nothing.")
    if quantize and controlnet:
        raise ValueError("eight bits do not go together with a ControlNet; leave out one of them.")
    workdir = storage.absolute(path)
    of_run = (workdir / "config.json").exists()
    config, stage = experiment.read_run(workdir, stage) if of_run else (_of_directory(path), "teacher")
    for settings in (config, config[stage]):
        if "network" in settings:
            settings.network.dtype = dtype or settings.network.dtype

    def read(parallel):
        shardings = experiment.replicated(parallel)
        if of_run:
            return experiment.load_params(config, f"{{workdir}}/{stage}", workdir, shardings=shardings)
        return experiment.load_directory(experiment.make_network(config), config.checkpoint, shardings)

    settings = _override(config[stage].sampler.to_dict(), sampler or {})
    return Found(config, stage, settings, functools.lru_cache(1)(read), controlnet, quantize)


def make_model(found: Found, batch_size: int) -> Model:
    """The model that makes `batch_size` images at once; see `load`."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
    parallel = sharding.Parallel(sharding.make_mesh(data=math.gcd(batch_size, jax.device_count())))
    config, stage = found.config.copy_and_resolve_references(), found.stage
    if "batch_size" in config.get("text", {}):
        config.text.batch_size = batch_size
    encoder = experiment.make_text_encoder(config, parallel) if "text" in config else None
    params, null = found.read(parallel), None
    if found.sampler.get("guidance_scale", 1) > 1:
        null = encoder.encode([""])[0] if encoder else config.null_cond
    denoiser, control_shape = experiment.make_denoiser(config, stage), None
    if found.quantize:
        cond = np.zeros((1, *encoder.shape), np.float32) if encoder else np.zeros(1, np.int32)
        denoiser, params = experiment.quantized(config, stage, params, cond)
    if found.controlnet:
        network, params, control_shape = _with_controlnet(found.controlnet, config, stage, params, parallel)
        denoiser, null = dataclasses.replace(denoiser, network=network), {"text": null, "control": None, "scale": None}
    made = experiment.build_sampler(denoiser, found.sampler, null, "sampler")
    sample = sampling.make_sample(made, parallel, batch_size)
    decode = latents.make_decode(experiment.autoencoder(config), parallel, batch_size)
    return Model(made, sample, decode, params, encoder, found.shape, config.network.num_classes, control_shape, {})


def _with_controlnet(path, config, stage, params, parallel):
    """A stage's network with a ControlNet, the parameters of both, and the shape of a control image."""
    settings, tensors = diffusers.controlnet(diffusers.find(path))
    network = lookup.find("models", settings.pop("name"))(**settings, dtype=config.network.dtype)
    both = controlnet_lib.controlled(experiment.make_network(config, stage), network)
    added = convert.from_torch(tensors, network.abstract, place=lambda array, path: sharding.place(array, parallel.replicated))
    return both, {"unet": params, "controlnet": added}, controlnet_lib.control_shape(network, experiment.image_shape(config))


def _override(settings, changes):
    """Another sampler takes over the number of steps and the guidance, if it has any."""
    if changes.get("name", settings["name"]) != settings["name"]:
        settings = {key: settings[key] for key in ("num_steps", "guidance_scale") if key in settings}
    settings |= changes
    if settings.get("num_steps", 1) < 1:
        raise ValueError(f"num_steps is {settings['num_steps']}; expected at least 1.")
    if settings["name"] in ("one_step", "rk45"):
        if "num_steps" in changes:
            raise ValueError(f"num_steps is {changes['num_steps']}, but the sampler is {settings['name']}; name another one.")
        settings.pop("num_steps", None)
    elif "num_steps" not in settings:
        raise ValueError(f"the sampler {settings['name']} needs num_steps; give it.")
    if not 0 <= settings.get("guidance_scale", 1) < math.inf:
        raise ValueError(f"guidance_scale is {settings['guidance_scale']}; expected a number of at least 0.")
    return settings


def _of_directory(path):
    """A config of what lies in a diffusers directory."""
    directory = diffusers.find(path)
    network, _ = diffusers.unet(directory)
    one_step = diffusers.is_one_step(directory)
    config = ml_collections.ConfigDict(diffusers.scheduler(directory))
    config.network = network | {"dtype": "float32", "remat": False}
    config.checkpoint = str(directory)
    config.text = dict(name="clip", checkpoint=str(directory), batch_size=1)
    config.autoencoder = dict(checkpoint=str(directory))
    config.teacher = dict(sampler=dict(name="one_step") if one_step else PIPELINE)
    return config


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dmd_jax.sample", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", "--model", required=True, dest="path", help="a run's directory, or a diffusers directory")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--prompts", help="a file of prompts, one a line")
    parser.add_argument("--label", action="append", type=int, help="of a class, in place of a prompt; may be given several times")
    parser.add_argument("--out", required=True, help="the picture: a grid of all images")
    parser.add_argument("--count", type=int, default=1, help="images of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=1, help="images at once, over as many devices as divide it")
    parser.add_argument("--stage", default="", help="of a run; the evaluation's student if not given")
    parser.add_argument("--dtype", default="", choices=["", "float32", "bfloat16"], help="of the network")
    names = [name for name in experiment.SAMPLERS if name != "stochastic_heun"]  # which has settings of its own
    parser.add_argument("--sampler", dest="name", choices=names, help="another one than the model's own")
    parser.add_argument("--num_steps", type=int, help="another number of steps")
    parser.add_argument("--guidance_scale", type=float, help="another scale of the guidance; 1 for none")
    parser.add_argument("--controlnet", default="", help="a ControlNet's diffusers directory")
    parser.add_argument("--control", action="append", help="a control image; may be given several times, once for each prompt")
    parser.add_argument("--control_scale", type=float, default=1.0, help="what the ControlNet's residuals are multiplied by")
    parser.add_argument("--quantize", default="", choices=["", "int8"], help="weights and activations in eight bits")
    parser.add_argument("--repeats", type=int, default=0, help="make the images so many times more, to time what needs no compiling")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace):
    """Writes the picture."""
    out = storage.path(arguments.out)
    if out.suffix not in (".png", ".jpg", ".webp") or not storage.has_parent(out):
        raise ValueError(f"--out is {out}; expected a .png, .jpg or .webp in a directory that exists.")
    prompts = list(arguments.prompt or [])
    if arguments.prompts:
        lines = storage.local(arguments.prompts).read_text(encoding="utf-8-sig").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if bool(prompts) == bool(arguments.label) or arguments.count < 1 or arguments.repeats < 0:
        raise ValueError("expected either texts, by --prompt or --prompts, or --label; --count of at least 1, --repeats of at least 0.")
    prompts = prompts or arguments.label
    changes = {key: getattr(arguments, key) for key in ("name", "num_steps", "guidance_scale") if getattr(arguments, key) is not None}
    paths = arguments.control or []
    copies = arguments.count if len(paths) > 1 else 1
    control = [image for path in paths for image in [_read_control(path)] * copies] or None
    names = ("stage", "batch_size", "dtype", "controlnet", "quantize")
    model = load(arguments.path, sampler=changes, **{name: getattr(arguments, name) for name in names})
    prompts = [prompt for prompt in prompts for _ in range(arguments.count)]
    for repeat in range(arguments.repeats + 1):
        images = model(prompts, seed=arguments.seed, control=control, control_scale=arguments.control_scale)
        parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in model.seconds.items())
        compiled = " with compiling" if repeat == 0 else ""
        calls = "as many network calls as it takes" if model.sampler.nfe is None else f"{model.sampler.nfe} network calls each"
        print(f"{len(images)} images in {sum(model.seconds.values()):.3f} s{compiled} ({parts}), {calls}")
    columns = min(len(images), 8)
    with storage.writing(out) as file:
        Image.fromarray(metrics.grid(images, columns)).save(file)
    print(out)


def _read_control(path):
    """[H, W, 3] in [0, 1]."""
    with Image.open(storage.local(path)) as picture:
        if picture.mode not in ("1", "L", "RGB") or "transparency" in picture.info:
            raise ValueError(f"{path} has mode {picture.mode}, expected RGB or grey without transparency; convert it first.")
        return np.asarray(picture.convert("RGB"), np.float32) / 255


def main():
    arguments = parse(sys.argv[1:])
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
