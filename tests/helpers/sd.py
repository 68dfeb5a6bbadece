"""A Stable Diffusion of toy size, random, as diffusers writes it to a directory."""

import json
import os
import pathlib

import pytest

from tests import test_features

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
test_features.import_torchvision()
diffusers, transformers = (pytest.importorskip(name) for name in ("diffusers", "transformers"))
safetensors = pytest.importorskip("safetensors.torch")

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = (
    "a t</w>",
    "c at</w>",
    "d o",
    "do g</w>",
    "p h",
    "ph o",
    "t o</w>",
    "o f</w>",
    "t h",
    "th e</w>",
)
SCHEDULER = {  # of Stable Diffusion 1.5
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
ENCODER = {  # of the UNet, and of a ControlNet
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def build(
    path,
    *,
    seed=0,
    variant=None,
    shards=False,
    old_names=False,
    prefix=False,
    tiny=False,
    prediction="epsilon",
    **unet,
):
    """Writes a Stable Diffusion with latents 8x8x4, images 16x16 (64x64 if `tiny`), and 77 tokens.

    The embeddings of tokens have the width 32.

    Args:
      path: a directory to be made.
      seed: of all weights.
      variant: such as "fp16", which also halves the weights.
      shards: whether the UNet comes in several files.
      old_names: whether the VAE's attention, and with `prefix` the text encoder's tensors, have the
        names that files of 2022 have.
      prefix: see above.
      tiny: whether the VAE is a TAESD.
      prediction: of the scheduler's config.
      **unet: other settings of the UNet than below.
    """
    path = pathlib.Path(path)
    settings = ENCODER | {"sample_size": 8, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    vocabulary = _vocabulary()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        models = {
            "unet": diffusers.UNet2DConditionModel(**(settings | unet)),
            "vae": _tiny() if tiny else _kl(),
            "text_encoder": transformers.CLIPTextModel(_text_config(vocabulary)),
        }
        for model in models.values():
            _disturb(model)
    for name, model in models.items():
        model = model.half() if variant == "fp16" else model
        model.save_pretrained(
            path / name,
            variant=variant,
            max_shard_size="200KB" if shards and name == "unet" else "1GB",
        )
    if old_names:
        _rename(path / "vae", _old_name)
    if prefix:
        _rename(
            path / "text_encoder",
            lambda key: f"text_model.{key}",
            {"embeddings.position_ids": torch.arange(77)[None]},
        )
    _write(path / "tokenizer/vocab.json", vocabulary)
    (path / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    _write(path / "tokenizer/special_tokens_map.json", special)
    _write(
        path / "tokenizer/tokenizer_config.json",
        special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"},
    )
    _write(
        path / "scheduler/scheduler_config.json",
        SCHEDULER | ({} if prediction == "epsilon" else {"prediction_type": prediction}),
    )
    _write(path / "model_index.json", _index("AutoencoderTiny" if tiny else "AutoencoderKL"))
    return path


def build_controlnet(path, *, seed=0, **settings):
    """Writes a ControlNet for such a UNet, with images of 16x16, to the directory `path`.

    `settings` replace those above.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = diffusers.ControlNetModel(
            **(ENCODER | {"conditioning_embedding_out_channels": (8, 16)} | settings)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():  # above all the convolutions that begin as zeros
                    parameter.normal_(std=0.5)
        _disturb(model)
    model.save_pretrained(path)
    return pathlib.Path(path)


def _kl():
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        sample_size=16,
    )


def _tiny():
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )


def _text_config(vocabulary):
    return transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=vocabulary[BOS],
        eos_token_id=2,  # the wrong one of old files
        pad_token_id=1,
    )


def _disturb(model):
    """Nothing is as in a fresh network: norms are not 1 and 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape) * (parameter.ndim == 1)


def _vocabulary():
    """Of byte-level BPE: bytes, bytes that end a word, merges, special tokens; in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = [
        *symbols,
        *(s + "</w>" for s in symbols),
        *(merge.replace(" ", "") for merge in MERGES),
        BOS,
        EOS,
    ]
    return {token: i for i, token in enumerate(tokens)}


def _index(vae):
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.6.0",
        "feature_extractor": [None, None],
    }
    index |= {
        "scheduler": ["diffusers", "PNDMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae],
    }
    index |= {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    return index | {"safety_checker": [None, None], "requires_safety_checker": False}


def _old_name(key):
    if ".attentions." in key:
        for new, old in OLD_NAMES.items():
            key = key.replace(new, old)
    return key


def _rename(component, name, more=None):
    (file,) = component.glob("*.safetensors")
    tensors = safetensors.load_file(file) | (more or {})
    safetensors.save_file(
        {name(key): tensor for key, tensor in tensors.items()}, file, metadata={"format": "pt"}
    )


def _write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2))
