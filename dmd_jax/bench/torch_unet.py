"""diffusers' UNet2DConditionModel with our weights, for comparison with `models/unet_sd.py`."""

from collections.abc import Callable

import numpy as np
import torch
from diffusers.models.unets import unet_2d_condition

from dmd_jax.weights import state_dict

VERSION = torch.__version__
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# settings of the same name and meaning in both
SHARED = (
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "use_linear_projection",
    "norm_num_groups",
)


def unet(settings: dict, params: dict, inputs: tuple[np.ndarray, ...]) -> Callable:
    """Returns a function without arguments that runs the network once on `inputs`.

    Args:
      settings: of `unet_sd.unet`.
      params: of `unet_sd.unet`, float32; they are copied one after another.
      inputs: x [B, H, W, C], noise [B], cond [B, L, D].

    Returns:
      `() -> tensor` [B, H, W, C].
    """
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, like JAX's default
    attention = settings["attention"]
    dtype = getattr(torch, settings["dtype"])
    kinds = dict(
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        attention_head_dim=settings["num_heads"],  # diffusers means the number of heads
        sample_size=settings["size"],
        in_channels=settings["channels"],
        out_channels=settings["channels"],
    )
    with torch.device("meta"):
        module = unet_2d_condition.UNet2DConditionModel(
            **{key: settings[key] for key in SHARED}, **kinds
        ).eval()
    tensors = {name: _tensor(a, dtype) for name, a in state_dict.to_torch(params).items()}
    module.load_state_dict(tensors, assign=True)
    x, noise, cond = (torch.tensor(a, device=DEVICE) for a in inputs)
    x = x.permute(0, 3, 1, 2).to(dtype)
    cond = cond.to(dtype)

    @torch.inference_mode()
    def run():
        output = module(x, noise, cond).sample.permute(0, 2, 3, 1).float()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return output

    return run


def _tensor(array, dtype):
    tensor = torch.tensor(array, device=DEVICE, dtype=dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
