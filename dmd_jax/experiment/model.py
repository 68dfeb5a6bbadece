"""Images from prompts or labels, by what a run has trained or by a diffusers directory.

python -m dmd_jax sample --workdir=/data/coco --prompt="a photograph of an astronaut riding a horse" --out=astronaut.png

    import dmd_jax
    model = dmd_jax.load("/data/coco")
    images = model(["a photograph of an astronaut riding a horse"], seed=0)     # [1, 512, 512, 3] float32 in [-1, 1]
"""

import dataclasses
import functools
import inspect
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dmd_jax import encoders, generate, lookup, samplers, sharding
from dmd_jax.encoders import autoencoder
from dmd_jax.experiment import build
from dmd_jax.experiment import settings as settings_lib
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.models import controlnet as controlnet_lib
from dmd_jax.runtime import storage
from dmd_jax.weights import diffusers, state_dict

# What Stable Diffusion's own pipeline does.
PIPELINE = {"name": "pndm", "num_steps": 50, "guidance_scale": 7.5}


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
    encoder: encoders.Encoder | None
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
        inputs = generate.inputs(seed, range(len(conditions)), self.shape, conditions)
        if noise is not None:
            if np.shape(noise) != inputs["z"].shape:
                raise ValueError(
                    f"noise has shape {np.shape(noise)}, expected {inputs['z'].shape}."
                )
            inputs["z"] = np.asarray(noise, np.float32)
        made = self.sample(self.params, inputs)
        sampled = time.perf_counter()
        images = np.clip(self.decode(made), -1, 1)
        self.seconds.update(
            text=encoded - start, network=sampled - encoded, decoder=time.perf_counter() - sampled
        )
        return images

    def _cond(self, prompts):
        if self.encoder is None:
            labels = np.array(prompts)
            if (
                labels.dtype.kind != "i"
                or labels.min() < 0
                or labels.max() >= max(self.num_classes, 1)
            ):
                raise ValueError(
                    f"expected labels from 0 to {max(self.num_classes, 1) - 1}, got {prompts}; this network knows no texts."
                )
            return labels.astype(np.int32)
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"expected texts, got {prompts}.")
        for i in self.encoder.truncated(prompts):
            warnings.warn(
                f"prompt {i} is longer than {self.encoder.shape[0]} tokens and is cut: {prompts[i][:60]!r}...",
                stacklevel=4,
            )
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
                raise ValueError(
                    "control needs a ControlNet, expected none here; load the model with controlnet=directory."
                )
            return {}
        if images is None:
            raise ValueError(
                f"expected control, images {self.control_shape} for the ControlNet; give one, or load the model without it."
            )
        for i, image in enumerate(images):
            if np.shape(image) != self.control_shape:
                raise ValueError(
                    f"control image {i} has shape {np.shape(image)}, expected {self.control_shape}; resize the images first."
                )
            if not (np.min(image) >= 0 and np.max(image) <= 1):
                raise ValueError(
                    f"control image {i} is from {np.min(image)} to {np.max(image)}, expected 0 to 1; divide bytes by 255."
                )
        if len(images) not in (1, n) or not math.isfinite(scale):
            raise ValueError(
                f"got {len(images)} control images of scale {scale} for {n} prompts; expected 1 or {n}, of a finite scale."
            )
        control = np.asarray(images, np.float32)
        return {
            "control": np.broadcast_to(control, (n, *self.control_shape)),
            "scale": np.full(n, scale, np.float32),
        }


class Found(NamedTuple):
    """What a path holds; `make_model` makes a model of it, for any size of batches.

    Attributes:
      stage: of the run, or of the directory.
      sampler: settings.
      read: `parallel -> params`, on all its devices; they are read once for the same devices.
      controlnet: a directory, or nothing.
      quantize: "int8", or nothing.
    """

    stage: build.Stage
    sampler: dict
    read: Callable
    controlnet: str
    quantize: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[H, W, C] of an image; `stage.image_shape` is that of a latent."""
        return autoencoder.image_shape(self.stage.run.autoencoder, self.stage.image_shape)


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
    return make_model(
        find(
            path,
            stage=stage,
            dtype=dtype,
            sampler=sampler,
            controlnet=controlnet,
            quantize=quantize,
        ),
        batch_size,
    )


def find(
    path: str,
    *,
    stage: str = "",
    dtype: str = "",
    sampler: dict | None = None,
    controlnet: str = "",
    quantize: str = "",
) -> Found:
    """Finds what `load` makes a model of, and leaves its weights to be read.

    Arguments and errors are those of `load`.
    """
    if quantize not in ("", "int8"):
        raise ValueError(f"quantize is {quantize!r}; expected 'int8' or nothing.")
    if quantize and controlnet:
        raise ValueError("eight bits do not go together with a ControlNet; leave out one of them.")
    workdir = storage.absolute(path)
    of_run = (workdir / "config.json").exists()
    if of_run:
        stage = workdir_lib.read_run(workdir, stage, dtype=dtype)
    else:
        stage = _of_directory(path, dtype or "float32")

    def read(parallel):
        shardings = build.replicated(parallel)
        if of_run:
            return workdir_lib.load_params(stage, workdir, shardings=shardings)
        return workdir_lib.load_directory(stage.network, stage.settings.checkpoint, shardings)

    settings = _override(dict(stage.settings.sampler), sampler or {})
    return Found(stage, settings, functools.lru_cache(1)(read), controlnet, quantize)


def make_model(found: Found, batch_size: int) -> Model:
    """Makes the model that makes `batch_size` images at once; see `load`."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
    parallel = sharding.Parallel(sharding.make_mesh(data=math.gcd(batch_size, jax.device_count())))
    stage = found.stage
    run = stage.run
    if run.text and "batch_size" in run.text:
        run = dataclasses.replace(run, text=run.text | {"batch_size": batch_size})
    encoder = build.text_encoder(run, parallel) if run.text else None
    params = found.read(parallel)
    null = None
    if found.sampler.get("guidance_scale", 1) > 1:
        null = encoder.encode([""])[0] if encoder else run.null_cond
    denoiser = stage.denoiser
    control_shape = None
    if found.quantize:
        cond = np.zeros((1, *encoder.shape), np.float32) if encoder else np.zeros(1, np.int32)
        denoiser, params = build.quantized(stage, params, cond)
    if found.controlnet:
        network, params, control_shape = _with_controlnet(found.controlnet, stage, params, parallel)
        denoiser = dataclasses.replace(denoiser, network=network)
        null = {"text": null, "control": None, "scale": None}
    sampler = build.guided_sampler(denoiser, found.sampler, null, "sampler")
    return Model(
        sampler=sampler,
        sample=generate.make_sample(sampler, parallel, batch_size),
        decode=autoencoder.make_decode(run.autoencoder, parallel, batch_size),
        params=params,
        encoder=encoder,
        shape=stage.image_shape,
        num_classes=stage.num_classes,
        control_shape=control_shape,
        seconds={},
    )


def _with_controlnet(path, stage, params, parallel):
    """A stage's network with a ControlNet, the parameters of both, and the shape of a control image."""
    settings, tensors = diffusers.controlnet(diffusers.find(path))
    network = lookup.find("models", settings.pop("name"))(
        **settings, dtype=stage.run.network["dtype"]
    )
    both = controlnet_lib.controlled(stage.network, network)
    place = lambda array, path: sharding.place(array, parallel.replicated)
    added = state_dict.from_torch(tensors, network.abstract, place=place)
    shape = controlnet_lib.control_shape(network, stage.image_shape)
    return both, {"unet": params, "controlnet": added}, shape


def _override(settings, changes):
    """Another sampler takes over the number of steps and the guidance, if it has any."""
    if changes.get("name", settings["name"]) != settings["name"]:
        settings = {
            key: settings[key] for key in ("num_steps", "guidance_scale") if key in settings
        }
    settings |= changes
    if settings.get("num_steps", 1) < 1:
        raise ValueError(f"num_steps is {settings['num_steps']}; expected at least 1.")
    make = lookup.find("samplers", settings["name"])
    if "num_steps" not in inspect.signature(make).parameters:
        if "num_steps" in changes:
            raise ValueError(
                f"num_steps is {changes['num_steps']}, but the sampler is {settings['name']}; name another one."
            )
        settings.pop("num_steps", None)
    elif "num_steps" not in settings:
        raise ValueError(f"the sampler {settings['name']} needs num_steps; give it.")
    if not 0 <= settings.get("guidance_scale", 1) < math.inf:
        raise ValueError(
            f"guidance_scale is {settings['guidance_scale']}; expected a number of at least 0."
        )
    return settings


def _of_directory(path, dtype):
    """The one stage of what lies in a diffusers directory."""
    directory = diffusers.find(path)
    network, _ = diffusers.unet(directory)
    sampler = {"name": "one_step"} if diffusers.is_one_step(directory) else PIPELINE
    run = settings_lib.Run(
        stages=("teacher",),
        network=network | {"dtype": dtype, "remat": False},
        text={"name": "clip", "checkpoint": str(directory), "batch_size": 1},
        autoencoder={"checkpoint": str(directory)},
        mesh=settings_lib.Mesh(),
        **diffusers.scheduler(directory),
    )
    teacher = settings_lib.ImportWeights(
        program="import_weights", checkpoint=str(directory), sampler=sampler
    )
    return build.from_settings(run, {"teacher": teacher})["teacher"]
