import chex
import numpy as np
import pytest

from dmd_jax.weights import convert


def test_round_trip(network):
    params = network.init(0)
    chex.assert_trees_all_equal(convert.from_torch(convert.to_torch(params), network.abstract), params)


def test_names_and_shapes_are_pytorchs(network):
    params = network.init(0)
    tensors = convert.to_torch(params)
    conv, linear = params["enc"]["4x4_block0"]["conv0"]["kernel"], params["map_layer0"]["kernel"]
    np.testing.assert_array_equal(tensors["enc.4x4_block0.conv0.weight"], conv.transpose(3, 2, 0, 1))  # OIHW
    np.testing.assert_array_equal(tensors["map_layer0.weight"], linear.T)  # [out, in]
    shapes = {name: tensors[name].shape for name in tensors}
    assert shapes["enc.4x4_block0.conv0.weight"] == (16, 8, 3, 3)
    assert shapes["map_label.weight"] == (8, 10)
    assert shapes["enc.4x4_block0.conv0.bias"] == shapes["dec.4x4_in0.norm2.weight"] == (16,)
    assert shapes["enc.8x8_conv.weight"] == (8, 1, 3, 3)
    assert shapes["dec.8x8_aux_norm.weight"] == (8,)


def test_every_misfit_is_listed_at_once(network):
    tensors = convert.to_torch(network.init(0))
    tensors["model_ema.decay"] = tensors.pop("map_layer0.bias")
    tensors["another"] = tensors.pop("enc.8x8_conv.weight")
    tensors["map_label.weight"] = tensors["map_label.weight"].T
    tensors["map_layer1.weight"] = tensors["map_layer1.weight"][:, :, None]
    with pytest.raises(ValueError) as error:
        convert.from_torch(tensors, network.abstract)
    for problem in (
        "missing map_layer0.bias",
        "missing enc.8x8_conv.weight",
        "unused model_ema.decay",
        "unused another",
        "map_label.weight has shape (10, 8), expected (8, 10)",
        "map_layer1.weight has shape (32, 32, 1), expected (32, 32)",
    ):
        assert problem in str(error.value)
