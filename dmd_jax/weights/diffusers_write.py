"""A one-step Stable Diffusion as a directory that diffusers opens.

Its scheduler is the one whose default is the very step of the generator: DDIM with "trailing" timesteps, of which a single one is 999, and
with alpha 1 after the last, makes x_hat = (z - sigma eps) / alpha.
"""

import json
import os
import pathlib
import re
import shutil
import tempfile

import ml_dtypes
import numpy as np
import safetensors.numpy

from dmd_jax.weights import convert, diffusers
from dmd_jax.weights import diffusers_files as files

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
SCHEDULER = {
    diffusers.ONE_STEP: True,
    "_class_name": "DDIMScheduler",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
CARD = """---
{front}library_name: diffusers
pipeline_tag: text-to-image
tags: [distillation, one-step, dmd, jax]
---

# One-step generator distilled from {base_model}

```python
import diffusers

pipe = diffusers.StableDiffusionPipeline.from_pretrained("this directory")
image = pipe("a photo of a cat", num_inference_steps=1, guidance_scale=1.0).images[0]
```

Always use `num_inference_steps=1` and `guidance_scale=1.0`, and leave the scheduler as it is. There is no safety checker.

Made with dmd_jax by Distribution Matching Distillation (https://arxiv.org/abs/2311.18828): the UNet was trained to make in one step what
{base_model} makes in many. The autoencoder, the text encoder and the tokenizer are those of {base_model}.

## Licence

{licence}
"""
KNOWN = "This is a derivative of {base_model}, whose licence holds: {name}."
UNKNOWN = "Unknown: {base_model} came without a statement of its licence. Find out which one holds before you use or pass on this model."


def write(
    out: str | os.PathLike,
    teacher: str | os.PathLike,
    params: dict,
    *,
    dtype: str = "float32",
    base_model: str | None = None,
    variant: str | None = None,
):
    """Writes the directory `out`, whole or not at all.

    Args:
      out: must not exist, or be empty.
      teacher: the directory whose other networks, tokenizer, settings and licence are taken over.
      params: of the generator, a network with the settings of the teacher's.
      dtype: of the UNet's weights: float32, float16 or bfloat16.
      base_model: the teacher's name, best that on the hub; None: that of its directory.
      variant: of the teacher's weight files.

    Raises:
      ValueError: `out` is not empty, the teacher's directory is not complete, or the parameters do not fit it or `dtype`.
    """
    out, teacher = pathlib.Path(out), pathlib.Path(teacher)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists already; choose another directory.")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out.absolute().parent} is not a directory; make it first.")
    if dtype not in DTYPES:
        raise ValueError(f"no dtype {dtype!r}; there are: {', '.join(DTYPES)}.")
    if missing := [name for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler") if not (teacher / name).is_dir()]:
        raise ValueError(f"{teacher} has no {'/, '.join(missing)}/; expected a whole directory in the layout of diffusers.")
    (unet_config, expected), (vae_config, _) = (files.read(teacher, name, variant) for name in ("unet", "vae"))
    process = diffusers.scheduler(teacher)
    tensors = _unet(params, expected, DTYPES[dtype])
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}-") as folder:
        new = pathlib.Path(folder, "model")
        (new / "unet").mkdir(parents=True)
        _write_json(new / "unet/config.json", unet_config)
        safetensors.numpy.save_file(tensors, new / "unet/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        for name in ("vae", "text_encoder"):
            _copy_network(teacher / name, new / name, variant)
        (new / "tokenizer").mkdir()
        for file in (*teacher.glob("tokenizer/*.json"), *teacher.glob("tokenizer/*.txt")):
            shutil.copy(file, new / "tokenizer")
        (new / "scheduler").mkdir()
        _write_json(new / "scheduler/scheduler_config.json", SCHEDULER | _noise(process))
        _write_json(new / "model_index.json", INDEX | {"vae": ["diffusers", vae_config["_class_name"]]})
        for file in _licence_files(teacher):
            shutil.copy(file, new / file.name)
        (new / "README.md").write_text(_card(teacher, base_model or teacher.absolute().name))
        new.rename(out)


def _unet(params, expected, dtype):
    """PyTorch's tensors with the names and shapes of the teacher's."""
    tensors, shapes = convert.to_torch(params), {name: expected.shape(name) for name in expected}
    problems = [f"missing {name}" for name in shapes if name not in tensors] + [f"unused {name}" for name in tensors if name not in shapes]
    if not problems:
        differing = [name for name, shape in shapes.items() if _plain(tensors[name].shape) != _plain(shape)]
        problems = [f"{name} has shape {tensors[name].shape}, expected {shapes[name]}" for name in differing]
    if problems:
        raise ValueError("the generator does not fit the teacher's UNet: " + "; ".join(problems))
    with np.errstate(over="ignore"):
        tensors = {name: np.ascontiguousarray(tensors[name].reshape(shape), dtype) for name, shape in shapes.items()}
    if lost := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise ValueError(f"the generator has values that are no finite {np.dtype(dtype).name}: {', '.join(lost[:5])}; use another dtype.")
    return tensors


def _plain(shape):
    """A 1x1 convolution's as that of a linear layer."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _copy_network(source, target, variant):
    """config.json and weight files, which lose their variant's name.

    transformers would load halved weights as they are, diffusers the UNet in float32; the two do not go together.
    """
    target.mkdir()
    config = {key: value for key, value in files.read_json(source / "config.json").items() if key != "dtype"}
    _write_json(target / "config.json", config | ({"torch_dtype": "float32"} if "model_type" in config else {}))
    chosen, parts = files.weight_files(source, variant)
    for file in {chosen, *parts}:
        name = re.sub(r"\.safetensors\.index\.\w+\.json$", ".safetensors.index.json", file.name) if file == chosen else file.name
        shutil.copy(file, target / re.sub(r"^(\w+)\.\w+\.safetensors$", r"\1.safetensors", name))


def _noise(process):
    prediction = next(name for name, ours in diffusers.PREDICTIONS.items() if ours == process["prediction"])
    return {"beta_start": process["process"]["beta_min"], "beta_end": process["process"]["beta_max"], "prediction_type": prediction}


def _licence_files(teacher):
    return [file for file in sorted(teacher.iterdir()) if file.is_file() and re.match(r"licen[cs]e", file.name, re.IGNORECASE)]


def _card(teacher, base_model):
    """The README.md, with what the teacher's says of its licence."""
    readme = teacher / "README.md"
    header = re.match(r"---\n(.*?)\n---", readme.read_text() if readme.is_file() else "", re.DOTALL)
    lines = re.findall(r"^license(?:_name|_link)?:.*$", header[1] if header else "", re.MULTILINE)
    name = ", ".join([*(line.split(":", 1)[1].strip() for line in lines), *(file.name for file in _licence_files(teacher))])
    front = [*lines, f"base_model: {base_model}\nbase_model_relation: finetune"] if re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) else lines
    licence = KNOWN.format(base_model=base_model, name=name) if name else UNKNOWN.format(base_model=base_model)
    return CARD.format(front="".join(f"{line}\n" for line in front), base_model=base_model, licence=licence)


def _write_json(path, content):
    content = {key: value for key, value in content.items() if key != "_name_or_path"}
    path.write_text(json.dumps(content, indent=2) + "\n")
