"""Adds LoRA files, or the difference of a fine-tuned model, to a model of one step or many.

python -m dmd_jax personalise --model=student --lora=style.safetensors:0.8 --out=styled
python -m dmd_jax personalise --model=student --custom=CUSTOM --base=BASE --out=OUT

    W += multiplier * (alpha / rank) * up @ down,    W += alpha * (W_custom - W_base)
"""

import argparse
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

from dmd_jax import commands
from dmd_jax.runtime import storage
from dmd_jax.weights import diffusers, diffusers_files, diffusers_write, lora

FOLDERS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
OF_CUSTOM = ("vae", "text_encoder", "tokenizer")
KIN = {  # what settings must be equal for weights to be exchanged
    "unet": (
        diffusers.unet,
        (
            "block_out_channels",
            "layers_per_block",
            "attention",
            "num_heads",
            "cross_attention_dim",
            "channels",
        ),
    ),
    "vae": (diffusers.vae, ("name", "latent_channels", "scaling_factor")),
    "text_encoder": (diffusers.text_encoder, ("hidden_size", "max_length")),
}


def personalise(
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    loras: Sequence[tuple[str | os.PathLike, float]] = (),
    custom: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    alpha: float = 1.0,
):
    """Writes `model` with other weights, in float32, as the directory `out`.

    Args:
      model: a diffusers directory, or a name on the hub, as are `custom` and `base`.
      out: must not exist, or be empty.
      loras: files of LoRA with multipliers, added one after the other, after `custom`.
      custom: a fine-tuned `base`, whose autoencoder, text encoder and tokenizer are taken over.
      base: what `custom` was made of; for one of Stable Diffusion 1.5, that.
      alpha: of the difference of the two.

    Raises:
      ValueError: there is nothing to do; something is missing, damaged or of another architecture;
        or `out` cannot be made.
    """
    if (custom is None) != (base is None):
        raise ValueError(
            f"custom is {custom} and base is {base}; what is added is the difference of the two: "
            "give both, or none."
        )
    if not loras and custom is None:
        raise ValueError("there is nothing to do; give a LoRA, or a custom model and its base.")
    if custom is None and alpha != 1:
        raise ValueError(
            f"alpha is {alpha}, but there is no custom model; a LoRA has a multiplier of its own."
        )
    if not all(map(math.isfinite, (alpha, *(multiplier for _, multiplier in loras)))):
        raise ValueError(
            f"alpha is {alpha}, multipliers are {[multiplier for _, multiplier in loras]}; "
            "expected finite numbers."
        )
    diffusers_write.check_vacant(out, model)
    model, custom, base = (
        diffusers.find(path) if path is not None else None for path in (model, custom, base)
    )
    _check_folders(model, FOLDERS)
    others = {}
    if custom is not None:
        _check_folders(custom, ("unet", *OF_CUSTOM))
        _check_kin(custom, model, KIN)
        _check_kin(base, model, ("unet",))
        others = {name: custom / name for name in OF_CUSTOM}
    networks: dict[str, Any] = {
        "unet": diffusers.unet(model)[1],
        "text_encoder": diffusers.text_encoder(custom or model)[1],
    }
    shapes = {
        network: {name: tensors.shape(name) for name in tensors}
        for network, tensors in networks.items()
    }
    factors = [(lora.read(file, shapes), multiplier) for file, multiplier in loras]
    networks["unet"] = _turned(model, networks["unet"])
    changed = {}
    if custom is not None:
        theirs, before = (_turned(path, diffusers.unet(path)[1]) for path in (custom, base))
        changed["unet"] = lora.transfer(networks["unet"], theirs, before, alpha)
    for by_network, multiplier in factors:
        for network, parts in by_network.items():
            changed[network] = lora.merge(
                changed.get(network, networks[network]), parts, multiplier
            )
    if "unet" in changed:
        changed["unet"] = _turned(model, changed["unet"])
    diffusers_write.write_changed(out, model, changed, others)


def _turned(directory, tensors):
    """Turns the sign of the last convolution to that of its training, and back."""
    scheduler = directory / "scheduler/scheduler_config.json"
    if not scheduler.exists() or not diffusers_files.read_json(scheduler).get(
        diffusers_write.NEGATED
    ):
        return tensors
    return {
        name: -tensors[name] if name.startswith("conv_out.") else tensors[name] for name in tensors
    }


def _check_folders(directory, names):
    if missing := [name for name in names if not (directory / name).is_dir()]:
        raise ValueError(
            f"{directory} has no {'/, '.join(missing)}/; expected a whole directory in the layout "
            "of diffusers."
        )


def _settings(network):
    """The settings of a network: a dict, or a function with arguments that makes it."""
    if isinstance(network, functools.partial):
        return {"name": network.func.__name__} | network.keywords
    return network


def _check_kin(directory, model, networks):
    """Whether two directories' networks can stand for one another."""
    problems = []
    for network in networks:
        read, keys = KIN[network]
        theirs = _settings(read(directory)[0])
        ours = _settings(read(model)[0])
        differing = [key for key in keys if theirs.get(key) != ours.get(key)]
        problems += [
            f"{key} of its {network} is {theirs.get(key)!r}, expected {ours.get(key)!r}"
            for key in differing
        ]
    if problems:
        raise ValueError(
            f"{directory} is of another architecture than {model}: {'; '.join(problems)}."
        )


def _lora(argument):
    """FILE or FILE:MULTIPLIER."""
    file, _, multiplier = argument.rpartition(":")
    try:
        return (file, float(multiplier)) if file else (argument, 1.0)
    except ValueError as error:
        if storage.path(file).is_file():
            raise argparse.ArgumentTypeError(
                f"the multiplier {multiplier!r} of {file} is no number"
            ) from error
        return argument, 1.0  # a colon of the path


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = commands.parser("personalise", __doc__)
    parser.add_argument("--model", required=True, help="the diffusers directory to start from")
    parser.add_argument("--out", required=True, help="the directory to be written")
    help_lora = "FILE or FILE:MULTIPLIER, a .safetensors file; may be given several times"
    parser.add_argument("--lora", action="append", default=[], type=_lora, help=help_lora)
    parser.add_argument(
        "--custom", help="directory of a fine-tuned model, whose difference from --base is added"
    )
    parser.add_argument("--base", help="directory of what --custom was made of")
    parser.add_argument(
        "--alpha", type=float, default=1.0, help="how much of the difference is added"
    )
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace):
    """Writes what the command line asks for."""
    personalise(
        arguments.model,
        arguments.out,
        loras=arguments.lora,
        custom=arguments.custom,
        base=arguments.base,
        alpha=arguments.alpha,
    )
    print(arguments.out)
