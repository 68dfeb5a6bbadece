"""Networks in eight bits, after training: weights and activations of convolutions and linear layers as integers from -128 to 127,

    W x ~ s_W s_x (round(W / s_W) round(x / s_x)),    s = max |.| / 127.5,

with a scale for each output channel of W and, of x, for each image (convolutions) or each token (linear layers), found as it comes. So
nothing is calibrated, and the images of a batch do not share a scale. The products are summed as integers. This is done by Google's qwix.

In float stay the layers of FLOAT, and whatever has no kernel: norms, softmax and the products of attention. An activation at half an
integer goes either way with the last bit of a float, so results that would be the same in float up to the order of sums, such as those of
different batch sizes, differ here by as much as the rounding does: by around 1 %, like the images from those of the network in float.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from dmd_jax.models import layers

FLOAT = (  # regexes of layers
    r"(^|/)(enc/\d+x\d+_conv|conv_in)$",  # the first one
    r"(^|/)(dec/\d+x\d+_aux_conv|out_conv|conv_out)$",  # the last one
    r"(^|/)(map_\w+|affine|time_embedding/\w+|time_emb_proj|aux_residual)$",  # of noise level and label; of the image, in NCSN++
)


def int8(network: layers.Network, params: dict, inputs: tuple) -> tuple[Callable, dict]:
    """A UNet's function and parameters in eight bits.

    Args:
      network: of `models.unet_edm` or `models.unet_sd`.
      params: its parameters.
      inputs: of the network, such as (x, noise, cond), of any batch size; shapes will do, as jax.ShapeDtypeStruct.

    Returns:
      `(params, *inputs) -> output`, which takes the place of `network.apply`, and its parameters: those given, but the kernels of the
      other layers are {"array": {"qvalue": int8, "scale": float32}}.

    Raises:
      ValueError: qwix is not installed, or the network has other layers than expected.
    """
    qwix = require_qwix()
    paths = [
        "/".join(path[:-1]) for path in traverse_util.flatten_dict(params) if path[-1] == "kernel"
    ]
    idle = [regex for regex in FLOAT if not any(re.search(regex, path) for path in paths)]
    if idle:
        raise ValueError(
            f"layers that stay in float, of which the network has none: {idle}; it has: {paths}."
        )
    chosen = {path for path in paths if not any(re.search(regex, path) for regex in FLOAT)}
    rule = qwix.QuantizationRule(
        module_path="|".join(map(re.escape, chosen)), weight_qtype=jnp.int8, act_qtype=jnp.int8
    )

    def build(params, inputs):
        model = qwix.quantize_model(
            network.bind(params), qwix.PtqProvider([rule]), *inputs, skip_nnx_init=True
        )
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.Dict):
                for name in ("qwix_path", "disable_quant_stats_update", "qwix_rngs"):
                    delattr(module, name)  # they would pass for children
        model(*inputs)
        return model

    model = nnx.eval_shape(build, params, inputs)
    made = qwix.quantize_params(jax.tree.map(jnp.asarray, params), model)
    done = {
        "/".join(path[:-3]) for path in traverse_util.flatten_dict(made) if path[-1] == "qvalue"
    }
    if done != chosen:
        raise ValueError(
            f"layers that were not called with these inputs, or not recognised by qwix: {sorted(chosen - done)}."
        )
    graphdef, _ = nnx.split(model)
    return lambda params, *inputs: nnx.merge(graphdef, params)(*inputs), made


def require_qwix():
    """The package.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise ValueError(
            "eight bits need the package qwix; pip install 'dmd_jax[quantize]'."
        ) from error
    return qwix
