"""Directories of Stable Diffusion in the layout of diffusers.

There is a folder per network, with config.json and .safetensors files. Beside those folders, only
one thing is read: whether model_index.json names InstaFlow's pipeline. The checkpoints of rectified
flows have Stable Diffusion's scheduler, which that pipeline does not use. `diffusers_write` writes
such directories.
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

# Keys of config.json from which settings follow, and those that must have one value (FIXED). Other
# keys must be absent, None or False.
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
    mid_block_type="UNetMidBlock2DCrossAttn",
    mid_block_scale_factor=1,
    transformer_layers_per_block=1,
    downsample_padding=1,
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
CLIP = {  # their name: ours
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "hidden_act": "act",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_length",
}
ABSENT = {"use_linear_projection": False, "scaling_factor": 0.18215}  # where old configs lack them
HARMLESS = {
    # Precision: the parts in question are float32 here in any case.
    "upcast_attention",
    "force_upcast",
    # These follow from other keys, or belong to something that is off.
    "sample_size",
    "block_out_channels",
    "addition_embed_type_num_heads",
    # These are for latents stored as bytes.
    "latent_magnitude",
    "latent_shift",
}
KINDS = {
    "UNet2DConditionModel": (UNET + UNET_MORE, UNET_FIXED),
    "ControlNetModel": (UNET + CONTROL_MORE, CONTROL_FIXED),
    "AutoencoderKL": (KL + KL_MORE, KL_FIXED),
    "AutoencoderTiny": (TINY, TINY_FIXED),
}
# The mark of a one-step generator in scheduler_config.json; diffusers ignores names with "_".
ONE_STEP = "_one_step"
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
FLOW = {  # F = eps - x, labels 1000 t
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "num_train_timesteps": 1000,
}
INSTAFLOW = "RectifiedFlowPipeline"  # _class_name in model_index.json


def find(name_or_path: str | os.PathLike, variant: str | None = None) -> storage.Path:
    """Returns a directory, which is fetched from the Hugging Face hub if it does not exist.

    The hub's library minds HF_HOME, HF_TOKEN and HF_HUB_OFFLINE.

    Args:
      name_or_path: the directory, or "owner/name" of a repository, of which networks, tokenizer,
        scheduler and licence are fetched.
      variant: of the weight files to fetch, such as "fp16".

    Raises:
      ValueError: the directory does not exist and cannot be fetched.
    """
    path = storage.path(name_or_path)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name_or_path)):
        raise ValueError(
            f"{path} is not a directory; expected one in the layout of diffusers, "
            f"or a name on the hub like owner/name{published.published(path)}."
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
    except Exception as error:  # the network, the hub, its licences and its cache raise many kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"{path} is not a directory, and was not fetched from the hub ({reason}); "
            "download it elsewhere and give its directory, "
            "or check the name, HF_TOKEN and HF_HUB_OFFLINE."
        ) from error


def unet(
    directory: str | os.PathLike, variant: str | None = None
) -> tuple[dict, Mapping[str, np.ndarray]]:
    """Returns the UNet's settings for a config, its `name` included, and its tensors.

    Raises:
      ValueError: see `diffusers_files.read`; or the network is of another kind, with a list of what
        is not supported.
    """
    config, tensors = files.read(directory, "unet", variant)
    config, problems = _checked(directory, "unet", config, "UNet2DConditionModel")
    settings, more = _encoder(config, ("layers_per_block", "cross_attention_dim", "sample_size"))
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(settings["attention"]))
    more += _differences(config, {"up_block_types": up, "out_channels": config["in_channels"]})
    _refuse(directory, "unet", problems + more)
    return {
        "name": "unet_sd.unet",
        "size": config["sample_size"],
        "num_classes": 0,
    } | settings, tensors


def controlnet(
    directory: str | os.PathLike, variant: str | None = None
) -> tuple[dict, Mapping[str, np.ndarray]]:
    """Returns a ControlNet like `unet`; it usually has a directory of its own."""
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
    _refuse(directory, "vae", problems + _differences(config, expected))
    return make, tensors


def text_encoder(
    directory: str | os.PathLike, variant: str | None = None
) -> tuple[dict, Mapping[str, np.ndarray]]:
    """Returns the arguments of `models.clip_text.clip` for the text encoder, and its tensors.

    Raises:
      ValueError: see `unet`.
    """
    config, tensors = files.read(directory, "text_encoder", variant)
    problems = _missing(config, ("model_type", *CLIP)) + _differences(
        config, {"model_type": "clip_text_model", "layer_norm_eps": 1e-5}
    )
    _refuse(directory, "text_encoder", problems)
    return {ours: config[key] for key, ours in CLIP.items()}, tensors


def scheduler(directory: str | os.PathLike) -> dict:
    """Returns the process and the prediction that the UNet was trained for.

    They are {"process": {"name": "VP", "beta_min": ..., "beta_max": ...}, "prediction": "eps" or
    "v"}, or {"process": {"name": "RectifiedFlow"}, "prediction": ...}, with "flow_to_data" if the
    pipeline is InstaFlow's, and "flow" if scheduler_config.json says so.

    Raises:
      ValueError: the UNet was trained for something else.
    """
    if _is_instaflow(directory):
        return {"process": {"name": "RectifiedFlow"}, "prediction": "flow_to_data"}
    config = {"prediction_type": "epsilon"} | files.read_json(
        files.folder(directory, "scheduler") / "scheduler_config.json"
    )
    if config["prediction_type"] == FLOW["prediction_type"]:
        _refuse(directory, "scheduler", _missing(config, FLOW) + _differences(config, FLOW))
        return {"process": {"name": "RectifiedFlow"}, "prediction": "flow"}
    problems = _missing(config, ("beta_schedule", "beta_start", "beta_end"))
    expected = dict(
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        trained_betas=None,
        rescale_betas_zero_snr=False,
    )
    problems += _differences(config, expected)
    if config["prediction_type"] not in PREDICTIONS:
        problems.append(
            f"prediction_type is {config['prediction_type']!r}, "
            f"expected {', '.join(PREDICTIONS)} or {FLOW['prediction_type']}"
        )
    _refuse(directory, "scheduler", problems)
    process = {"name": "VP", "beta_min": config["beta_start"], "beta_max": config["beta_end"]}
    return {"process": process, "prediction": PREDICTIONS[config["prediction_type"]]}


def is_one_step(directory: str | os.PathLike) -> bool:
    """Returns whether the UNet was made for one step.

    It was if `diffusers_write` wrote the directory, or if the pipeline is InstaFlow's. A
    2-rectified flow cannot be told from InstaFlow; its paper samples it in 25 steps of `euler` with
    a guidance_scale of 1.5.
    """
    if _is_instaflow(directory):
        return True
    config = files.read_json(files.folder(directory, "scheduler") / "scheduler_config.json")
    return config.get(ONE_STEP) is True


def digest(directory: str | os.PathLike, variant: str | None = None) -> str:
    """Returns the SHA-256 of those of the UNet's weight files."""
    weights = files.weight_files(files.folder(directory, "unet"), variant)[1]
    digests = " ".join(published.sha256(file) for file in weights)
    return hashlib.sha256(digests.encode()).hexdigest()


def _is_instaflow(directory):
    index = storage.path(directory) / "model_index.json"
    return index.exists() and files.read_json(index).get("_class_name") == INSTAFLOW


def _checked(directory, name, config, *classes):
    """Returns `config` with what old ones lack, and what is not supported in it."""
    kind = config.get("_class_name")
    if kind not in classes:
        _refuse(directory, name, [f"_class_name is {kind!r}, expected {' or '.join(classes)}"])
    needed, fixed = KINDS[kind]
    config = {key: value for key, value in ABSENT.items() if key in needed} | config
    _refuse(directory, name, _missing(config, needed))
    problems = _differences(config, fixed)
    for key in sorted(config.keys() - {*needed, *fixed, *HARMLESS}):
        if config[key] and not key.startswith("_"):
            problems.append(f"{key} is {config[key]!r}, expected none")
    return config, problems


def _encoder(config, numbers):
    """Returns the settings that a UNet and a ControlNet share, and what is not supported in them.

    The keys in `numbers` may have one number per level, if it is the same at all levels.
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
    settings |= {key: config[key] for key in UNET}
    return settings, problems + _differences(config, {"down_block_types": down})


def _missing(config, keys):
    return [f"{key} is missing" for key in keys if key not in config]


def _differences(config, expected):
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
