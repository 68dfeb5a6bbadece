import collections.abc

import chex
import jax
import numpy as np
import pytest

from dmd_jax.models import clip_text, unet_sd
from dmd_jax.weights import state_dict


def test_round_trip(network):
    params = network.init(0)
    chex.assert_trees_all_equal(
        state_dict.from_torch(state_dict.to_torch(params), network.abstract), params
    )


def test_names_and_shapes_are_pytorchs(network):
    params = network.init(0)
    tensors = state_dict.to_torch(params)
    conv, linear = params["enc"]["4x4_block0"]["conv0"]["kernel"], params["map_layer0"]["kernel"]
    np.testing.assert_array_equal(
        tensors["enc.4x4_block0.conv0.weight"], conv.transpose(3, 2, 0, 1)
    )  # OIHW
    np.testing.assert_array_equal(tensors["map_layer0.weight"], linear.T)  # [out, in]
    shapes = {name: tensors[name].shape for name in tensors}
    assert shapes["enc.4x4_block0.conv0.weight"] == (16, 8, 3, 3)
    assert shapes["map_label.weight"] == (8, 10)
    assert shapes["enc.4x4_block0.conv0.bias"] == shapes["dec.4x4_in0.norm2.weight"] == (16,)
    assert shapes["enc.8x8_conv.weight"] == (8, 1, 3, 3)
    assert shapes["dec.8x8_aux_norm.weight"] == (8,)


def test_every_misfit_is_listed_at_once(network):
    tensors = state_dict.to_torch(network.init(0))
    tensors["model_ema.decay"] = tensors.pop("map_layer0.bias")
    tensors["another"] = tensors.pop("enc.8x8_conv.weight")
    tensors["map_label.weight"] = tensors["map_label.weight"].T
    tensors["map_layer1.weight"] = tensors["map_layer1.weight"][:, :, None]
    with pytest.raises(ValueError) as error:
        state_dict.from_torch(tensors, network.abstract)
    for problem in (
        "missing map_layer0.bias",
        "missing enc.8x8_conv.weight",
        "unused model_ema.decay",
        "unused another",
        "map_label.weight has shape (10, 8), expected (8, 10)",
        "map_layer1.weight has shape (32, 32, 1), expected (32, 32)",
    ):
        assert problem in str(error.value)


class Lazy(collections.abc.Mapping):
    """Tensors that are read one at a time, with a diary."""

    def __init__(self, tensors):
        self.tensors, self.diary = tensors, []

    def __getitem__(self, name):
        self.diary.append(("read", name))
        return self.tensors[name]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def test_tensors_are_read_and_placed_one_by_one(network):
    params = network.init(0)
    lazy = Lazy(state_dict.to_torch(params))

    def place(array, path):
        lazy.diary.append(("placed", path))
        return 2 * array

    chex.assert_trees_all_equal(
        state_dict.from_torch(lazy, network.abstract, place), jax.tree.map(lambda a: 2 * a, params)
    )
    assert [event for event, _ in lazy.diary] == ["read", "placed"] * len(lazy)
    assert {name for event, name in lazy.diary if event == "read"} == set(lazy)
    assert ("placed", ("enc", "4x4_block0", "conv0", "kernel")) in lazy.diary


def test_embeddings_are_not_transposed():
    network = clip_text.clip(
        vocab_size=5, hidden_size=4, intermediate_size=8, num_layers=1, num_heads=1, max_length=3
    )
    params = network.init(0)
    tensors = state_dict.to_torch(params)
    np.testing.assert_array_equal(
        tensors["embeddings.token_embedding.weight"],
        params["embeddings"]["token_embedding"]["embedding"],
    )
    chex.assert_trees_all_equal(state_dict.from_torch(tensors, network.abstract), params)


@pytest.mark.parametrize("linear", [True, False])
def test_1x1_convolutions_are_linear_layers(linear):
    settings = dict(
        block_out_channels=(8,),
        attention=(True,),
        num_heads=2,
        layers_per_block=1,
        cross_attention_dim=4,
        norm_num_groups=4,
    )
    ours, theirs = (
        unet_sd.unet(**settings, use_linear_projection=kind) for kind in (linear, not linear)
    )
    tensors = state_dict.to_torch(theirs.init(0))
    name, x = (
        "mid_block.attentions.0.proj_in",
        np.random.default_rng(0).standard_normal((2, 3, 5, 8), np.float32),
    )
    assert tensors[f"{name}.weight"].shape == ((8, 8, 1, 1) if linear else (8, 8))
    project = (
        ours.bind(state_dict.from_torch(tensors, ours.abstract)).mid_block.attentions["0"].proj_in
    )
    np.testing.assert_allclose(project(x), x @ tensors[f"{name}.weight"].reshape(8, 8).T, atol=1e-5)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][..., :1, :1]
    tensors["time_embedding.linear_1.weight"] = tensors["time_embedding.linear_1.weight"][..., None]
    with pytest.raises(
        ValueError,
        match=(
            r"conv_in.weight has shape \(8, 4, 1, 1\).*; time_embedding.linear_1.weight "
            r"has shape \(32, 8, 1\)"
        ),
    ):
        state_dict.from_torch(tensors, ours.abstract)
