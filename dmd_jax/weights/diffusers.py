"""Directories of Stable Diffusion as diffusers lays them out: a folder per network, with
config.json and .safetensors files.

Only those folders count, and of model_index.json whether the pipeline is InstaFlow's: the
checkpoints of rectified flows have the scheduler of Stable Diffusion, which their pipeline passes
over. `diffusers_write` writes such directories.
"""

import functools
import hashlib
import os
import re
from collections.abc import Mapping

import numpy as np

from dmd_jax.models import vae as autoencoders
from dmd_jax.runtime import storage
from dmd_jax.weights import diffusers_files as files
from dmd_jax.weights import published

# Of config.json: keys that settings follow from, and what else must have one value. Further ones
# must be absent, None or False.
UNET = (
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "use_linear_projection",
    "norm_num_groups",
)
UNET_MORE = (
    "in_channels",
    "out_channels",
    "sample_size",
    "attention_head_dim",
    "down_block_types",
    "up_block_types",
)
UNET_FIXED = dict(
    act_fn="silu",
    norm_eps=1e-5,
    dropout=0,
    flip_sin_to_cos=True,
    freq_shift=0,
    time_embedding_type="positional",
)
UNET_FIXED |= dict(
    mid_block_type="UNetMidBlock2DCrossAttn",
    mid_block_scale_factor=1,
    transformer_layers_per_block=1,
    downsample_padding=1,
)
UNET_FIXED |= dict(
    resnet_time_scale_shift="default",
    resnet_out_scale_factor=1,
    attention_type="default",
    conv_in_kernel=3,
    conv_out_kernel=3,
)
CONTROL_MORE = (
    "in_channels",
    "attention_head_dim",
    "down_block_types",
    "conditioning_embedding_out_channels",
)
CONTROL_FIXED = UNET_FIXED | dict(
    conditioning_channels=3,
    controlnet_conditioning_channel_order="rgb",
    global_pool_conditions=False,
)
KL = (
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "scaling_factor",
    "norm_num_groups",
)
KL_MORE = ("down_block_types", "up_block_types")
KL_FIXED = dict(
    in_channels=3,
    out_channels=3,
    act_fn="silu",
    use_quant_conv=True,
    use_post_quant_conv=True,
    mid_block_add_attention=True,
)
TINY = (
    "encoder_block_out_channels",
    "decoder_block_out_channels",
    "num_encoder_blocks",
    "num_decoder_blocks",
    "latent_channels",
)
TINY_FIXED = dict(
    in_channels=3,
    out_channels=3,
    act_fn="relu",
    upsample_fn="nearest",
    upsampling_scaling_factor=2,
    scaling_factor=1,
)
CLIP = {key: key for key in ("vocab_size", "hidden_size", "intermediate_size")} | {
    "num_hidden_layers": "num_layers",
    "hidden_act": "act",
}
CLIP |= {"num_attention_heads": "num_heads", "max_position_embeddings": "max_length"}
ABSENT = {"use_linear_projection": False, "scaling_factor": 0.18215}  # in the first configs
HARMLESS = {"upcast_attention", "force_upcast"}  # precision, which is float32 here anyway
# Derived, or of what is off.
HARMLESS |= {
    "sample_size",
    "block_out_channels",
    "addition_embed_type_num_heads",
}
HARMLESS |= {"latent_magnitude", "latent_shift"}  # of latents stored as bytes
KINDS = {
    "UNet2DConditionModel": (UNET + UNET_MORE, UNET_FIXED),
    "ControlNetModel": (UNET + CONTROL_MORE, CONTROL_FIXED),
    "AutoencoderKL": (KL + KL_MORE, KL_FIXED),
    "AutoencoderTiny": (TINY, TINY_FIXED),
}
# The mark of a one-step generator in scheduler_config.json; diffusers passes over such names.
ONE_STEP = "_one_step"
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
# F = eps - x, labels 1000 t.
FLOW = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "num_train_timesteps": 1000,
}
INSTAFLOW = "RectifiedFlowPipeline"  # _class_name in model_index.json


def find(name_or_path: str | os.PathLike, variant: str | None = None) -> storage.Path:
    """A directory: one that is there, or what is fetched from the Hugging Face hub, which minds
    HF_HOME, HF_TOKEN and HF_HUB_OFFLINE.

    Args:
      name_or_path: the directory, or "owner/name" of a repository, of which networks, tokenizer,
        scheduler and licence are fetched.
      variant: of the weight files to be fetched, such as "fp16".

    Raises:
      ValueError: there is no such directory, and it cannot be fetched.
    """
    path = storage.path(name_or_path)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name_or_path)):
        raise ValueError(
            f"{path} is not a directory; expected one in the layout of diffusers, or a name on the "
            "hub like owner/name"
            f"{published.published(path)}."
        )
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"{path} is not a directory; to fetch it from the hub, pip install huggingface_hub."
        ) from None
    middle = f".{variant}" if variant else ""
    patterns = [
        "config.json",
        "model_index.json",
        "README.md",
        "LICEN[CS]E*",
        "tokenizer/*.json",
        "tokenizer/*.txt",
        "scheduler/*.json",
        f"{files.DEFAULT_STEM}{middle}.safetensors",
    ]
    for folder in ("unet", "vae", "text_encoder"):
        start = f"{folder}/{files.STEM.get(folder, files.DEFAULT_STEM)}{middle}"
        patterns += [
            f"{folder}/*.json",
            f"{start}.safetensors",
            f"{start}-?????-of-?????.safetensors",
        ]
    try:
        return storage.path(
            huggingface_hub.snapshot_download(str(name_or_path), allow_patterns=patterns)
        )
    except Exception as error:  # of the network, the hub, its licences and its cache
        raise ValueError(
            f"{path} is not a directory, and was not fetched from the hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); "
            "download it elsewhere and give its directory, or check the name, HF_TOKEN and "
            "HF_HUB_OFFLINE."
        ) from error


def unet(
    directory: str | os.PathLike, variant: str | None = None
) -> tuple[dict, Mapping[str, np.ndarray]]:
    """The UNet: `name` and arguments of its maker in `models`, and its tensors.

    Raises:
      ValueError: see `diffusers_files.read`; or it is of another kind, with all that is not
        supported.
    """
    config, tensors = files.read(directory, "unet", variant)
    config, problems = _checked(directory, "unet", config, "UNet2DConditionModel")
    settings, more = _encoder(config, ("layers_per_block", "cross_attention_dim", "sample_size"))
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(settings["attention"]))
    more += _differing(config, {"up_block_types": up, "out_channels": config["in_channels"]})
    _refuse(directory, "unet", problems + more)
    return {
        "name": "unet_sd.unet",
        "size": config["sample_size"],
        "num_classes": 0,
    } | settings, tensors


def controlnet(
    directory: str | os.PathLike, variant: str | None = None
) -> tuple[dict, Mapping[str, np.ndarray]]:
    """As `unet`, a ControlNet, which usually has a directory of its own."""
    config, tensors = files.read(directory, "controlnet", variant)
    config, problems = _checked(directory, "controlnet", config, "ControlNetModel")
    settings, more = _encoder(config, ("layers_per_block", "cross_attention_dim"))
    _refuse(directory, "controlnet", problems + more)
    settings["conditioning_embedding_out_channels"] = config["conditioning_embedding_out_channels"]
    return {"name": "controlnet.controlnet"} | settings, tensors


def vae(
    directory: str | os.PathLike, variant: str | None = None
) -> tuple[functools.partial, Mapping[str, np.ndarray]]:
    """Returns the function that makes the autoencoder, which may be a TAESD, and its tensors.

    The function has the autoencoder's settings, which arguments override.

    Raises:
      ValueError: see `unet`.
    """
    config, tensors = files.read(directory, "vae", variant)
    config, problems = _checked(directory, "vae", config, "AutoencoderKL", "AutoencoderTiny")
    if config["_class_name"] == "AutoencoderTiny":
        width = config["encoder_block_out_channels"][0]
        n = config["num_encoder_blocks"][-1]
        expected = {f"{half}_block_out_channels": (width,) * 4 for half in ("encoder", "decoder")}
        expected |= {"num_encoder_blocks": (1, n, n, n), "num_decoder_blocks": (n, n, n, 1)}
        channels = config["latent_channels"]
        make = functools.partial(
            autoencoders.tiny, width=width, num_blocks=n, latent_channels=channels
        )
    else:
        n = len(config["block_out_channels"])
        expected = {
            "down_block_types": ("DownEncoderBlock2D",) * n,
            "up_block_types": ("UpDecoderBlock2D",) * n,
        }
        make = functools.partial(autoencoders.kl, **{key: config[key] for key in KL})
    _refuse(directory, "vae", problems + _differing(config, expected))
    return make, tensors


def text_encoder(
    directory: str | os.PathLike, variant: str | None = None
) -> tuple[dict, Mapping[str, np.ndarray]]:
    """Returns the arguments of `models.clip_text.clip` for the text encoder, and its tensors.

    Raises:
      ValueError: see `unet`.
    """
    config, tensors = files.read(directory, "text_encoder", variant)
    problems = _missing(config, ("model_type", *CLIP)) + _differing(
        config, {"model_type": "clip_text_model", "layer_norm_eps": 1e-5}
    )
    _refuse(directory, "text_encoder", problems)
    return {ours: config[key] for key, ours in CLIP.items()}, tensors


def scheduler(directory: str | os.PathLike) -> dict:
    """What the UNet was trained for: {"process": {"name": "VP", "beta_min": ..., "beta_max": ...},
    "prediction": "eps" or "v"}, or {"process": {"name": "RectifiedFlow"}, "prediction":
    "flow_to_data"} where the pipeline is InstaFlow's, and "flow" where scheduler_config.json says
    so.

    Raises:
      ValueError: it is something else.
    """
    if _is_instaflow(directory):
        return {"process": {"name": "RectifiedFlow"}, "prediction": "flow_to_data"}
    config = {"prediction_type": "epsilon"} | files.read_json(
        files.folder(directory, "scheduler") / "scheduler_config.json"
    )
    if config["prediction_type"] == FLOW["prediction_type"]:
        _refuse(directory, "scheduler", _missing(config, FLOW) + _differing(config, FLOW))
        return {"process": {"name": "RectifiedFlow"}, "prediction": "flow"}
    problems = _missing(config, ("beta_schedule", "beta_start", "beta_end"))
    expected = dict(
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        trained_betas=None,
        rescale_betas_zero_snr=False,
    )
    problems += _differing(config, expected)
    if config["prediction_type"] not in PREDICTIONS:
        problems.append(
            f"prediction_type is {config['prediction_type']!r}, expected {', '.join(PREDICTIONS)} "
            f"or {FLOW['prediction_type']}"
        )
    _refuse(directory, "scheduler", problems)
    process = {"name": "VP", "beta_min": config["beta_start"], "beta_max": config["beta_end"]}
    return {"process": process, "prediction": PREDICTIONS[config["prediction_type"]]}


def is_one_step(directory: str | os.PathLike) -> bool:
    """Whether one step is what its UNet was made for: `diffusers_write` wrote it, or its pipeline
    is InstaFlow's.

    A 2-rectified flow cannot be told from InstaFlow. Its paper samples it in 25 steps of `euler`
    with a guidance_scale of 1.5.
    """
    if _is_instaflow(directory):
        return True
    config = files.read_json(files.folder(directory, "scheduler") / "scheduler_config.json")
    return config.get(ONE_STEP) is True


def digest(directory: str | os.PathLike, variant: str | None = None) -> str:
    """The SHA-256 of the UNet's weight files, one after the other."""
    sha256 = hashlib.sha256()
    for file in files.weight_files(files.folder(directory, "unet"), variant)[1]:
        with storage.local(file).open("rb") as opened:
            hashlib.file_digest(opened, lambda: sha256)
    return sha256.hexdigest()


def _is_instaflow(directory):
    index = storage.path(directory) / "model_index.json"
    return index.exists() and files.read_json(index).get("_class_name") == INSTAFLOW


def _checked(directory, name, config, *classes):
    """`config` with what the first ones lack, and all that is not supported in it."""
    kind = config.get("_class_name")
    if kind not in classes:
        _refuse(directory, name, [f"_class_name is {kind!r}, expected {' or '.join(classes)}"])
    taken, fixed = KINDS[kind]
    config = {key: value for key, value in ABSENT.items() if key in taken} | config
    _refuse(directory, name, _missing(config, taken))
    others = sorted(config.keys() - {*taken, *fixed, *HARMLESS})
    off = {key: config[key] for key in others if not key.startswith("_") and config[key]}
    return config, _differing(config, fixed) + [
        f"{key} is {value!r}, expected none" for key, value in off.items()
    ]


def _encoder(config, numbers):
    """Settings of the half that a ControlNet has too, and what is not supported there; `numbers`
    may come as one per level.
    """
    problems = []
    for key in numbers:
        if isinstance(config[key], tuple) and len(set(config[key])) == 1:
            config[key] = config[key][0]
        if not isinstance(config[key], int):
            problems.append(f"{key} is {config[key]!r}, expected one number")
    attention = tuple(kind == "CrossAttnDownBlock2D" for kind in config["down_block_types"])
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention)
    settings = {
        "channels": config["in_channels"],
        "attention": attention,
        "num_heads": config["attention_head_dim"],
    }
    return settings | {key: config[key] for key in UNET}, problems + _differing(
        config, {"down_block_types": down}
    )


def _missing(config, keys):
    return [f"{key} is missing" for key in keys if key not in config]


def _differing(config, expected):
    return [
        f"{key} is {config[key]!r}, expected {value!r}"
        for key, value in expected.items()
        if config.get(key, value) != value
    ]


def _refuse(directory, name, problems):
    if problems:
        raise ValueError(
            f"{directory}: its {name} is not supported: {'; '.join(problems)}; use another model."
        )
