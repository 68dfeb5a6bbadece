"""Writes a one-step Stable Diffusion as a directory that diffusers opens.

A single step of the directory's scheduler is the step of the generator. DDIM with "trailing"
timesteps, of which a single one is 999, and with alpha 1 after the last one, computes
x_hat = (z - sigma eps) / alpha. DPM-Solver++ of a flow, whose single step is at time 1, computes
x_hat = z - F with the label 1000. Where F = x - eps, the last convolution is written with the other
sign.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors.numpy

from dmd_jax.runtime import storage
from dmd_jax.weights import diffusers, state_dict
from dmd_jax.weights import diffusers_files as files

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
DDIM = {
    diffusers.ONE_STEP: True,
    "_class_name": "DDIMScheduler",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
FLOW = diffusers.FLOW | {
    diffusers.ONE_STEP: True,
    "_class_name": "DPMSolverMultistepScheduler",
    "solver_order": 1,
    # Moves the time of a single step from 0.999 to 1 - 1e-20, which is 1 in float64.
    "flow_shift": 1e17,
    "steps_offset": 1,
}
# In scheduler_config.json: whether the last convolution was written with the other sign.
NEGATED = "_negated"
CARD = """---
{front}library_name: diffusers
pipeline_tag: text-to-image
tags: [distillation, one-step, {tag}, jax]
---

# One-step generator distilled from {base_model}

```python
import diffusers

pipe = diffusers.StableDiffusionPipeline.from_pretrained("this directory")
image = pipe("a photo of a cat", num_inference_steps=1, guidance_scale=1.0).images[0]
```

Always use `num_inference_steps=1` and `guidance_scale=1.0`, and leave the scheduler as it is.
There is no safety checker.
{flow}
Made with dmd_jax by {method}: the UNet was trained to make in one
step what {base_model} makes in many. The autoencoder, the text encoder and the tokenizer are those
of {base_model}.

## Licence

{licence}
"""
CARD_OF_FLOW = """
The UNet is that of a rectified flow and predicts noise - image: the latents of the image are
`z - unet(z, 1000, text)`.
"""
KNOWN = "This is a derivative of {base_model}, whose licence holds: {name}."
UNKNOWN = (
    "Unknown: {base_model} came without a statement of its licence. "
    "Find out which one holds before you use or pass on this model."
)


def write(
    out: str | os.PathLike,
    teacher: str | os.PathLike,
    params: dict,
    *,
    dtype: str = "float32",
    base_model: str | None = None,
    variant: str | None = None,
    trained_for: dict | None = None,
    method: tuple[str, str],
):
    """Writes the directory `out`, whole or not at all (see `storage.writing`).

    Args:
      out: must not exist, or be empty.
      teacher: the directory that the other networks, tokenizer, settings and licence are copied
        from.
      params: of the generator, a network with the settings of the teacher's.
      dtype: of the UNet's weights: float32, float16 or bfloat16.
      base_model: the teacher's name, preferably on the hub; None for the name of its directory.
      variant: of the teacher's weight files.
      trained_for: process and prediction of the generator, as `diffusers.scheduler` returns them;
        None for those of the teacher.
      method: how a card calls what trained it, and its tag: a `recipes.Method`.

    Raises:
      ValueError: `out` is not empty, the teacher's directory is not complete, the parameters do not
        fit it or `dtype`, or diffusers has no such step.
    """
    check_vacant(out, teacher)
    teacher = storage.path(teacher)
    if dtype not in DTYPES:
        raise ValueError(f"no dtype {dtype!r}; there are: {', '.join(DTYPES)}.")
    folders = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    missing = [name for name in folders if not (teacher / name).is_dir()]
    if missing:
        raise ValueError(
            f"{teacher} has no {'/, '.join(missing)}/; "
            "expected a whole directory in the layout of diffusers."
        )
    unet_config, expected = files.read(teacher, "unet", variant)
    vae_config, _ = files.read(teacher, "vae", variant)
    trained_for = trained_for or diffusers.scheduler(teacher)
    scheduler = _scheduler(trained_for["process"], trained_for["prediction"])
    tensors = _unet(params, trained_for["prediction"], expected, DTYPES[dtype])
    with storage.writing(out) as new:
        (new / "unet").mkdir(parents=True)
        _write_json(new / "unet/config.json", unet_config)
        safetensors.numpy.save_file(
            tensors, new / "unet/diffusion_pytorch_model.safetensors", metadata={"format": "pt"}
        )
        for name in ("vae", "text_encoder"):
            _copy_network(teacher / name, new / name, variant)
        (new / "tokenizer").mkdir()
        for file in (*teacher.glob("tokenizer/*.json"), *teacher.glob("tokenizer/*.txt")):
            shutil.copy(storage.local(file), new / "tokenizer")
        (new / "scheduler").mkdir()
        _write_json(new / "scheduler/scheduler_config.json", scheduler)
        index = INDEX | {
            "vae": ["diffusers", vae_config["_class_name"]],
            "scheduler": ["diffusers", scheduler["_class_name"]],
        }
        _write_json(new / "model_index.json", index)
        for file in _licence_files(teacher):
            shutil.copy(storage.local(file), new / file.name)
        (new / "README.md").write_text(
            _card(teacher, base_model or storage.absolute(teacher).name, method, scheduler)
        )


def _unet(params, prediction, expected, dtype):
    """Returns PyTorch's tensors with the teacher's names and shapes, and with diffusers' sign."""
    tensors = state_dict.to_torch(params)
    shapes = {name: expected.shape(name) for name in expected}
    if prediction == "flow_to_data":
        tensors |= {
            name: -tensor for name, tensor in tensors.items() if name.startswith("conv_out.")
        }
    problems = [f"missing {name}" for name in shapes if name not in tensors]
    problems += [f"unused {name}" for name in tensors if name not in shapes]
    if not problems:
        problems = [
            f"{name} has shape {tensors[name].shape}, expected {shape}"
            for name, shape in shapes.items()
            if _plain(tensors[name].shape) != _plain(shape)
        ]
    if problems:
        raise ValueError("the generator does not fit the teacher's UNet: " + "; ".join(problems))
    with np.errstate(over="ignore"):
        tensors = {
            name: np.ascontiguousarray(tensors[name].reshape(shape), dtype)
            for name, shape in shapes.items()
        }
    lost = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if lost:
        raise ValueError(
            f"the generator has values that are no finite {np.dtype(dtype).name}: "
            f"{', '.join(lost[:5])}; use another dtype."
        )
    return tensors


def _plain(shape):
    """Returns the shape of a 1x1 convolution as that of a linear layer."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _copy_config(source, target):
    """Copies config.json, and sets float32 in that of a text encoder.

    transformers would load halved weights as they are, but diffusers loads the UNet in float32, and
    the two do not work together.
    """
    target.mkdir()
    config = files.read_json(source / "config.json")
    config.pop("dtype", None)
    if "model_type" in config:
        config["torch_dtype"] = "float32"
    _write_json(target / "config.json", config)


def _copy_network(source, target, variant):
    """Copies config.json and weight files, which lose their variant's name."""
    _copy_config(source, target)
    main_file, parts = files.weight_files(source, variant)
    for file in {main_file, *parts}:
        name = file.name
        if file == main_file:
            name = re.sub(r"\.safetensors\.index\.\w+\.json$", ".safetensors.index.json", name)
        name = re.sub(r"^(\w+)\.\w+\.safetensors$", r"\1.safetensors", name)
        shutil.copy(storage.local(file), target / name)


def _scheduler(process, prediction):
    """Returns the content of scheduler_config.json."""
    of_vp = {ours: theirs for theirs, ours in diffusers.PREDICTIONS.items()}
    if process["name"] == "VP" and prediction in of_vp:
        return DDIM | {
            "beta_start": process["beta_min"],
            "beta_end": process["beta_max"],
            "prediction_type": of_vp[prediction],
        }
    if process["name"] == "RectifiedFlow" and prediction in ("flow", "flow_to_data"):
        return FLOW | {NEGATED: prediction == "flow_to_data"}
    raise ValueError(
        f"diffusers has no scheduler for the process {process['name']} with the prediction "
        f"{prediction!r}; expected VP with {' or '.join(of_vp)}, "
        "or RectifiedFlow with flow or flow_to_data."
    )


def _licence_files(teacher):
    return [
        file
        for file in sorted(teacher.iterdir())
        if file.is_file() and re.match(r"licen[cs]e", file.name, re.IGNORECASE)
    ]


def _card(teacher, base_model, method, scheduler):
    """Returns the content of README.md, with what the teacher's README.md says of its licence."""
    readme = teacher / "README.md"
    text = readme.read_text() if readme.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    lines = re.findall(r"^license(?:_name|_link)?:.*$", header[1] if header else "", re.MULTILINE)
    names = [line.split(":", 1)[1].strip() for line in lines]
    names += [file.name for file in _licence_files(teacher)]
    licence = UNKNOWN.format(base_model=base_model)
    if any(names):
        licence = KNOWN.format(base_model=base_model, name=", ".join(names))
    front = list(lines)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        front += [f"base_model: {base_model}", "base_model_relation: finetune"]
    method, tag = method
    flow = CARD_OF_FLOW if scheduler["_class_name"] == FLOW["_class_name"] else ""
    front = "".join(f"{line}\n" for line in front)
    return CARD.format(
        front=front, base_model=base_model, licence=licence, method=method, tag=tag, flow=flow
    )


def _write_json(path, content):
    content = {key: value for key, value in content.items() if key != "_name_or_path"}
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_changed(
    out: str | os.PathLike,
    directory: str | os.PathLike,
    changed: Mapping[str, Mapping[str, np.ndarray]],
    others: Mapping[str, storage.Path],
):
    """Writes `out`, a copy of `directory` with other weights in it (see `storage.writing`).

    Networks that are not changed are copied as they are, or without their variant's name if they
    have no other weights. Single weight files beside the folders are left out, because they would
    hold the old weights.

    Args:
      out: must not exist, or be empty.
      directory: in the layout of diffusers; any pipeline and scheduler will do.
      changed: by folder ("unet", "text_encoder"), all tensors of the network in float32, by the
        names of `diffusers_files.read`.
      others: by folder, the folder of another directory that takes its place.

    Raises:
      ValueError: see `check_vacant` and `diffusers_files.read`; or tensors have values that are not
        finite.
    """
    check_vacant(out, directory)
    sources = {
        path.name: path
        for path in sorted(storage.path(directory).iterdir())
        if not path.name.startswith(".")
    } | dict(others)
    with storage.writing(out) as new:
        new.mkdir()
        for name, source in sources.items():
            if name in changed:
                _write_network(source, new / name, changed[name])
            elif source.is_dir() and _only_variant(source):
                _copy_network(source, new / name, None)
            elif source.is_dir():
                shutil.copytree(storage.local(source), new / name)
            elif source.suffix not in (".safetensors", ".ckpt", ".bin"):
                shutil.copy(storage.local(source), new / name)


def check_vacant(out: str | os.PathLike, source: str | os.PathLike):
    """Raises ValueError if a directory `out` cannot be made, or if it is inside `source`."""
    out = storage.absolute(out)
    if out.resolve().is_relative_to(storage.path(source).resolve()):
        raise ValueError(f"{out} is in {source}; choose a directory outside of it.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists already; choose another directory.")
    if not storage.has_parent(out):
        raise ValueError(f"{out.parent} is not a directory; make it first.")


def _write_network(source, target, tensors):
    lost = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if lost:
        raise ValueError(
            f"the new {target.name} has values that are not finite: {', '.join(lost[:5])}; "
            "use smaller changes."
        )
    _, old = files.read(source.parent, source.name)
    _copy_config(source, target)
    file = target / f"{files.STEM.get(target.name, files.DEFAULT_STEM)}.safetensors"
    safetensors.numpy.save_file(
        {old.places[name][1]: tensor for name, tensor in tensors.items()},
        file,
        metadata={"format": "pt"},
    )


def _only_variant(folder):
    """Returns whether there are weights, and only those of a variant."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return False
    return not re.fullmatch(r"\w+\.safetensors(\.index\.json)?", files.weight_files(folder)[0].name)
