"""Post-training quantisation of networks to eight bits, by Google's qwix.

Weights and activations of convolutions and linear layers become integers from -128 to 127:

    W x ~ s_W s_x (round(W / s_W) round(x / s_x)),    s = max |.| / 127.5,

with one scale for each output channel of W and, for x, one for each image (convolutions) or each
token (linear layers). The scales of x are computed with each input, so nothing is calibrated, and
the images of a batch do not share a scale. The products are summed as integers.

The network's `float_layers` stay in float, and so does whatever has no kernel: norms, softmax and
the products of attention.

An activation at half an integer is rounded up or down by the last bit of a float. So results that
differ in float only by the order of sums, such as those of different batch sizes, differ here by as
much as the rounding does: by around 1 %, like the images from those of the network in float.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from dmd_jax.models import layers


def int8(network: layers.Network, params: dict, inputs: tuple) -> tuple[Callable, dict]:
    """Returns a network's function and its parameters in eight bits.

    Args:
      network: has `float_layers`.
      params: its parameters.
      inputs: of the network, such as (x, noise, cond), of any batch size; jax.ShapeDtypeStruct is
        enough.

    Returns:
      `(params, *inputs) -> output`, which takes the place of `network.apply`, and its parameters:
      those of the argument, in which the kernels of the quantised layers are
      {"array": {"qvalue": int8, "scale": float32}}.

    Raises:
      ValueError: qwix is not installed, or the network lacks `float_layers` or has other layers
        than expected.
    """
    qwix = require_qwix()
    paths = [
        "/".join(path[:-1]) for path in traverse_util.flatten_dict(params) if path[-1] == "kernel"
    ]
    layers_in_eight_bits = _eight_bits(paths, network.float_layers)
    rule = qwix.QuantizationRule(
        module_path="|".join(map(re.escape, layers_in_eight_bits)),
        weight_qtype=jnp.int8,
        act_qtype=jnp.int8,
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
    quantized = qwix.quantize_params(jax.tree.map(jnp.asarray, params), model)
    quantized_layers = {
        "/".join(path[:-3])
        for path in traverse_util.flatten_dict(quantized)
        if path[-1] == "qvalue"
    }
    if quantized_layers != layers_in_eight_bits:
        raise ValueError(
            "layers that were not called with these inputs, or not recognised by qwix: "
            f"{sorted(layers_in_eight_bits - quantized_layers)}."
        )
    graphdef, _ = nnx.split(model)

    def apply(params, *inputs):
        return nnx.merge(graphdef, params)(*inputs)

    return apply, quantized


def _eight_bits(paths, float_layers):
    """Returns those of the layers `paths` that no regex of `float_layers` matches."""
    if not float_layers:
        raise ValueError(
            "the network does not say which of its layers stay in float; "
            "give layers.functional its float_layers."
        )
    idle = [regex for regex in float_layers if not any(re.search(regex, path) for path in paths)]
    if idle:
        raise ValueError(
            f"layers that stay in float, of which the network has none: {idle}; it has: {paths}."
        )
    return {path for path in paths if not any(re.search(regex, path) for regex in float_layers)}


def require_qwix():
    """Returns the package qwix.

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
