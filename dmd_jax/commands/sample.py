"""Makes images and writes them as one picture.

python -m dmd_jax sample --workdir=/tmp/digits --label=3 --count=8 --out=threes.png
python -m dmd_jax sample --model=stable-diffusion-v1-5 --prompt="a red apple" --out=apple.png
"""

import argparse

import numpy as np
from PIL import Image

from dmd_jax import commands, samplers
from dmd_jax.data import pixels
from dmd_jax.experiment import model as model_lib
from dmd_jax.runtime import storage


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = commands.parser("sample", __doc__)
    path = parser.add_mutually_exclusive_group(required=True)
    path.add_argument("--workdir", help="directory of a run")
    path.add_argument("--model", help="a diffusers directory, or its name on the hub")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--prompts", help="a file of prompts, one a line")
    parser.add_argument(
        "--label",
        action="append",
        type=int,
        help="of a class, in place of a prompt; may be given several times",
    )
    parser.add_argument("--out", required=True, help="the picture: a grid of all images")
    parser.add_argument("--count", type=int, default=1, help="images of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch_size",
        type=int,
        default=1,
        help="images at once, over as many devices as divide it",
    )
    parser.add_argument(
        "--stage", default="", help="of a run; the evaluation's student if not given"
    )
    parser.add_argument(
        "--dtype", default="", choices=["", "float32", "bfloat16"], help="of the network"
    )
    parser.add_argument(
        "--sampler",
        dest="name",
        help=f"another one than the model's own, such as {', '.join(samplers.CHOICES)}",
    )
    parser.add_argument("--num_steps", type=int, help="another number of steps")
    parser.add_argument(
        "--guidance_scale", type=float, help="another scale of the guidance; 1 for none"
    )
    parser.add_argument("--controlnet", default="", help="a ControlNet's diffusers directory")
    parser.add_argument(
        "--control",
        action="append",
        help="a control image; may be given several times, once for each prompt",
    )
    parser.add_argument(
        "--control_scale",
        type=float,
        default=1.0,
        help="what the ControlNet's residuals are multiplied by",
    )
    parser.add_argument(
        "--quantize", default="", choices=["", "int8"], help="weights and activations in eight bits"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=0,
        help="make the images so many times more, to time what needs no compiling",
    )
    commands.add_plugins(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace):
    """Writes the picture."""
    out = storage.path(arguments.out)
    if out.suffix not in (".png", ".jpg", ".webp") or not storage.has_parent(out):
        raise ValueError(
            f"--out is {out}; expected a .png, .jpg or .webp in a directory that exists."
        )
    prompts = list(arguments.prompt or [])
    if arguments.prompts:
        lines = storage.local(arguments.prompts).read_text(encoding="utf-8-sig").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if bool(prompts) == bool(arguments.label) or arguments.count < 1 or arguments.repeats < 0:
        raise ValueError(
            "expected either texts, by --prompt or --prompts, or --label; --count of at least 1, "
            "--repeats of at least 0."
        )
    prompts = prompts or arguments.label
    path = arguments.model if arguments.workdir is None else arguments.workdir
    if arguments.model is None and not (storage.absolute(path) / "config.json").exists():
        raise ValueError(
            f"--workdir={path} is no run's directory: it has no config.json; a "
            "directory in the layout of diffusers is --model."
        )
    changes = {
        key: getattr(arguments, key)
        for key in ("name", "num_steps", "guidance_scale")
        if getattr(arguments, key) is not None
    }
    paths = arguments.control or []
    copies = arguments.count if len(paths) > 1 else 1
    control = [image for path in paths for image in [_read_control(path)] * copies] or None
    names = ("stage", "batch_size", "dtype", "controlnet", "quantize")
    model = model_lib.load(
        path,
        sampler=changes,
        **{name: getattr(arguments, name) for name in names},
    )
    prompts = [prompt for prompt in prompts for _ in range(arguments.count)]
    for repeat in range(arguments.repeats + 1):
        images = model(
            prompts, seed=arguments.seed, control=control, control_scale=arguments.control_scale
        )
        parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in model.seconds.items())
        compiled = " with compiling" if repeat == 0 else ""
        calls = (
            "as many network calls as it takes"
            if model.sampler.nfe is None
            else f"{model.sampler.nfe} network calls each"
        )
        print(
            f"{len(images)} images in {sum(model.seconds.values()):.3f} s{compiled} ({parts}), "
            f"{calls}"
        )
    columns = min(len(images), 8)
    with storage.writing(out) as file:
        Image.fromarray(pixels.grid(images, columns)).save(file)
    print(out)


def _read_control(path):
    """[H, W, 3] in [0, 1]."""
    with Image.open(storage.local(path)) as picture:
        if picture.mode not in ("1", "L", "RGB") or "transparency" in picture.info:
            raise ValueError(
                f"{path} has mode {picture.mode}, expected RGB or grey without transparency; "
                "convert it first."
            )
        return np.asarray(picture.convert("RGB"), np.float32) / 255
