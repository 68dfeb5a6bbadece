import io
import os
import pickle
import struct
import sys
import types
import zipfile

import chex
import numpy as np
import pytest

from dmd_jax.weights import edm, pickles, state_dict

torch = pytest.importorskip("torch")


class EasyDict(dict):
    pass


class Persistent:
    """Pickled as EDM's persistent classes are."""

    def __init__(self, class_name, state):
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        source = "import os\nos.system('touch executed')"
        meta = EasyDict(
            type="class", version=6, module_src=source, class_name=self.class_name, state=self.state
        )
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.fixture
def layout(monkeypatch):
    """The modules that EDM's pickles refer to, as long as a test runs."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta):
        exec(meta["module_src"])

    _reconstruct_persistent_obj.__module__ = persistence.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj, util.EasyDict = _reconstruct_persistent_obj, EasyDict
    monkeypatch.setattr(EasyDict, "__module__", "dnnlib.util")
    for module in (persistence, util, types.ModuleType("torch_utils"), types.ModuleType("dnnlib")):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def module_state(tensors, **more):
    """Returns a PyTorch module's attributes, with `tensors` nested by the dots in their names."""
    state = dict(torch.nn.Module().__dict__) | more
    for name, tensor in tensors.items():
        if "." not in name and name in ("resample_filter", "freqs"):
            state["_buffers"][name] = torch.tensor(tensor)
        elif "." not in name:
            state["_parameters"][name] = torch.nn.Parameter(torch.tensor(tensor))
    state["_buffers"]["nothing"] = None
    for child in dict.fromkeys(name.split(".")[0] for name in tensors if "." in name):
        inner = {
            name.removeprefix(child + "."): tensor
            for name, tensor in tensors.items()
            if name.startswith(child + ".")
        }
        if child in ("enc", "dec"):
            state["_modules"][child] = torch.nn.ModuleDict()
            state["_modules"][child].__dict__.update(module_state(inner))
        else:
            state["_modules"][child] = Persistent("Layer", module_state(inner))
    return state


def snapshot(tensors, *, precond="EDMPrecond", model="SongUNet", protocol=4, **statements):
    """A network snapshot of EDM in its public layout, of tensors named with "model."."""
    inner = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    own = EasyDict(
        img_resolution=8,
        in_channels=1,
        label_dim=10,
        model_channels=8,
        channel_mult=[1, 2],
        attn_resolutions=[4, 16],
    )
    state = module_state(
        {},
        **(
            dict(img_resolution=8, img_channels=1, label_dim=10, sigma_data=0.5, use_fp16=False)
            | statements
        ),
    )
    state["_modules"]["model"] = Persistent(
        model, module_state(inner, _init_args=(), _init_kwargs=own)
    )
    loss, options = (
        Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2}),
        EasyDict(path="cifar10.zip"),
    )
    content = dict(
        ema=Persistent(precond, state), loss_fn=loss, augment_pipe=None, dataset_kwargs=options
    )
    return pickle.dumps(content, protocol=protocol)


def put(path, data):
    path.write_bytes(data)
    return path


def assert_equal_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


def fourier_tensors():
    """Returns the tensors that decide an NCSN++'s settings, and those of its filters."""
    shapes = {
        "map_noise.freqs": (4,),
        "map_layer0.weight": (32, 8),
        "map_augment.weight": (8, 9),
        "enc.8x8_conv.weight": (8, 3, 3, 3),
    }
    shapes |= {f"dec.{r}x{r}_block{i}.conv0.weight": (8, 8, 3, 3) for r in (8, 4) for i in range(3)}
    shapes |= {
        "enc.4x4_down.conv0.weight": (8, 8, 3, 3),
        "enc.4x4_aux_residual.weight": (8, 3, 3, 3),
        "dec.8x8_up.skip.weight": (8, 8, 1, 1),
    }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_in_edms_layout(layout, network, tiny, tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    params = network.init(0)
    expected = edm.from_params(params)
    assert "model.dec.8x8_up.skip.resample_filter" in expected
    tensors, settings = edm.read(put(tmp_path / "edm.pkl", snapshot(expected, protocol=protocol)))
    assert_equal_tensors({f"model.{name}": tensor for name, tensor in tensors.items()}, expected)
    assert settings == tiny | {"name": "unet_edm.ddpmpp", "augment_dim": 0}
    chex.assert_trees_all_equal(edm.to_params(tensors, network.abstract), params)
    assert os.listdir(tmp_path) == ["edm.pkl"]  # module_src did not run


@pytest.mark.parametrize("prefix", ["", "model."])
def test_round_trips(network, tiny, tmp_path, prefix):
    params = network.init(0)
    expected = tiny | {"name": "unet_edm.ddpmpp", "augment_dim": 0}
    edm.write(tmp_path / "a.safetensors", params, expected)
    np.savez(
        tmp_path / "a.npz",
        **{prefix + name.removeprefix("model."): t for name, t in edm.from_params(params).items()},
    )
    for name in ("a.safetensors", "a.npz"):
        tensors, settings = edm.read(tmp_path / name)
        assert settings == expected
        chex.assert_trees_all_equal(edm.to_params(tensors, network.abstract), params)


def test_snapshots_that_are_refused(layout, network, tmp_path):
    tensors = edm.from_params(network.init(0))
    for data, message in (
        (snapshot(tensors, precond="VPPrecond"), "preconditioning VPPrecond, expected EDMPrecond"),
        (
            snapshot(tensors, model="DhariwalUNet"),
            "a DhariwalUNet with the tensors of unet_edm.ddpmpp",
        ),
        (snapshot(tensors, model="Other"), "holds a Other"),
        (snapshot(tensors, sigma_data=1.0), "another sigma_data"),
        (snapshot(tensors, label_dim=1000), "num_classes is 10 in the checkpoint, 1000"),
        (pickle.dumps({"G": None}), "has no network 'ema'"),
        (snapshot({"model.map_layer0.weight": np.zeros((2, 2))}), "has no dec"),
    ):
        with pytest.raises(ValueError, match=message):
            edm.read(put(tmp_path / "edm.pkl", data))
    for name in ("edm.bin", "missing.npz", "missing.safetensors", "missing.pkl"):
        with pytest.raises(ValueError, match=name):
            edm.read(tmp_path / name)


def test_misfits_are_listed(network):
    tensors = {
        name.removeprefix("model."): t for name, t in edm.from_params(network.init(0)).items()
    }
    tensors["another"] = tensors.pop("map_layer0.bias")
    tensors["enc.8x8_block0.conv0.resample_filter"] = np.ones((1, 1, 2, 2))
    with pytest.raises(ValueError) as error:
        edm.to_params(tensors, network.abstract)
    for problem in (
        "missing map_layer0.bias",
        "unused another",
        "unused enc.8x8_block0.conv0.resample_filter",
    ):
        assert problem in str(error.value)
    tensors["dec.8x8_up.conv0.resample_filter"] = (
        np.outer([1, 3, 3, 1], [1, 3, 3, 1])[None, None] / 64
    )
    tensors["enc.4x4_down.skip.resample_filter"] = np.full((1, 1, 2, 2), 0.2)
    with pytest.raises(
        ValueError,
        match=(
            r"than \[1, "
            r"1\].*(dec.8x8_up.conv0|enc.4x4_down.skip).*(dec.8x8_up.conv0|enc.4x4_down.skip)"
        ),
    ):
        edm.to_params(tensors, network.abstract)


def test_settings_of_the_other_families():
    tensors = fourier_tensors()
    settings = dict(
        name="unet_edm.ncsnpp",
        size=8,
        channels=3,
        num_classes=0,
        width=8,
        multipliers=(1, 1),
        num_blocks=2,
    )
    settings |= dict(attention=(), augment_dim=9)
    assert edm.settings_of(tensors) == settings
    del tensors["map_noise.freqs"]
    tensors |= {"out_conv.weight": np.zeros((3, 8, 3, 3)), "map_label.weight": np.zeros((32, 5))}
    tensors["dec.4x4_block2.qkv.weight"] = np.zeros((24, 8, 1, 1))
    assert edm.settings_of(tensors) == settings | dict(
        name="unet_edm.adm", num_classes=5, attention=(4,)
    )
    del tensors["dec.4x4_block1.conv0.weight"]
    with pytest.raises(ValueError, match="3 at 8x8, 2 at 4x4"):
        edm.settings_of(tensors)


def test_filters_of_ncsnpp():
    tensors = fourier_tensors()
    params = {
        "map_noise": {"freqs": np.zeros(4)},
        "enc": {"4x4_down": {"norm0": {"bias": np.zeros(4)}}},
    }
    params["enc"]["4x4_aux_residual"] = {"bias": np.zeros(4)}
    written = edm.from_params(params)
    row = np.array([1, 3, 3, 1]) / 8
    for place in ("4x4_down.conv0", "4x4_down.skip", "4x4_aux_residual"):
        np.testing.assert_array_equal(
            written.pop(f"model.enc.{place}.resample_filter"), np.outer(row, row)[None, None]
        )
    assert sorted(written) == [
        "model.enc.4x4_aux_residual.bias",
        "model.enc.4x4_down.norm0.bias",
        "model.map_noise.freqs",
    ]
    tensors["enc.4x4_aux_residual.resample_filter"] = np.full((1, 1, 2, 2), 0.25)
    with pytest.raises(ValueError, match=r"than \[1, 3, 3, 1\].*aux_residual"):
        edm.to_params(tensors, {})


def test_check_settings():
    found = dict(name="unet_edm.adm", num_classes=10, multipliers=(1, 2), augment_dim=None)
    state_dict.check_settings(found, dict(multipliers=[1, 2], augment_dim=9, dtype="float32"))
    with pytest.raises(
        ValueError,
        match=r"num_classes is 10 in the checkpoint, 0 in the config; multipliers is \[1, 2\]",
    ):
        state_dict.check_settings({**found}, dict(num_classes=0, multipliers=[2, 2]))


@pytest.mark.parametrize("new", [True, False])
def test_torch_save(tmp_path, new):
    base = torch.arange(24.0)
    names = (
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
        "uint16",
        "uint32",
        "uint64",
    )
    content = {name: torch.arange(5).to(getattr(torch, name)) for name in names}
    content |= {
        "t": base.reshape(4, 6).T,
        "slice": base[3:9:2],
        "expanded": base[:3].expand(4, 3),
        "zero": base[:0],
        "scalar": base[5],
    }
    more = {
        "parameter": torch.nn.Parameter(base),
        "lr": 0.1,
        "step": 3,
        "betas": (0.9, None),
        "tags": {"a"},
        "size": base.shape,
    }
    more |= {
        "modules": torch.nn.Sequential(torch.nn.Linear(2, 3)),
        "device": base.device,
        "dtype": torch.float32,
        0: [True, "x", b"y"],
    }
    torch.save(content | more, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    found = pickles.read(tmp_path / "a.pt")
    assert found.keys() == (content | more).keys()
    for name, tensor in content.items():
        expected = tensor.float().numpy() if name == "bfloat16" else tensor.numpy()
        assert found[name].shape == tuple(tensor.shape) and str(found[name].dtype) == str(
            tensor.dtype
        ).removeprefix("torch.")
        np.testing.assert_array_equal(found[name].astype(expected.dtype), expected)
    np.testing.assert_array_equal(found["parameter"], base.numpy())
    assert {k: found[k] for k in ("lr", "step", "betas", "tags", "size")} == {
        k: more[k] for k in ("lr", "step", "betas", "tags", "size")
    }
    assert (
        found["device"] == "cpu" and found["dtype"] == np.float32 and found[0] == [True, "x", b"y"]
    )
    chex.assert_trees_all_equal(
        pickles.state_dict(found["modules"]),
        {k: v.numpy() for k, v in more["modules"].state_dict().items()},
    )


@pytest.mark.parametrize("new", [True, False])
def test_state_dict_of_torch(tmp_path, new):
    expected = torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)
    ).state_dict()  # has attributes: _metadata
    torch.save(expected, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    assert_equal_tensors(
        pickles.read(tmp_path / "a.pt"), {k: v.numpy() for k, v in expected.items()}
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy(tmp_path, protocol):
    a = np.arange(6.0).reshape(2, 3)
    content = {
        "a": a,
        "fortran": np.asfortranarray(a),
        "big": a.astype(">f4"),
        "half": a.astype("f2"),
        "bool": a > 2,
        "zero": a[:, :0],
    }
    data = pickle.dumps(content | {"scalar": np.float32(0.5), "bytes": b"\xff"}, protocol=protocol)
    found = pickles.read(put(tmp_path / "a.ckpt", data))
    assert (found.pop("scalar"), found.pop("bytes")) == (0.5, b"\xff")
    assert_equal_tensors(found, content)
    if protocol in (2, 3):  # as older numpy names it
        assert pickles.read(put(tmp_path / "a.ckpt", data.replace(b"numpy._core", b"numpy.core")))[
            "a"
        ].shape == (2, 3)


def storage(name="FloatStorage", numel=4, data=None, magic=pickles.MAGIC):
    """A storage of 4 elements as torch.save's format before zip writes it."""
    pickled = (
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\n"
        + name.encode()
        + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    pickled += b"\x8a\x08" + struct.pack("<q", numel) + b"tQ."
    head = b"".join(
        pickle.dumps(value, protocol=2) for value in (magic, 1001, {"little_endian": True})
    )
    return (
        head
        + pickled
        + pickle.dumps(["0"], protocol=2)
        + struct.pack("<q", numel)
        + (bytes(16) if data is None else data)
    )


def tensor_of(offset, size, stride, raw=None):
    """A pickle of one tensor."""
    parts = [pickle.dumps(value, protocol=2)[2:-1] for value in (offset, size, stride, False, None)]
    loaded = (
        b"ctorch.storage\n_load_from_bytes\n"
        + pickle.dumps(storage() if raw is None else raw, protocol=3)[2:-1]
        + b"\x85R"
    )
    return b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n(" + loaded + b"".join(parts) + b"tR."


def test_tensor_in_a_pickle(tmp_path):
    found = pickles.read(
        put(
            tmp_path / "a.pkl",
            tensor_of(1, (2, 1), (1, 7), storage(data=np.arange(4, dtype="f4").tobytes())),
        )
    )
    np.testing.assert_array_equal(found, np.array([[1], [2]], np.float32))
    assert not found.flags.writeable


def nested_tuples(depth, key=False):
    return b"\x80\x02" + b"}" * key + b")" + b"\x85" * depth + b"K\x01s" * key + b"."


def laughs(levels):
    """A dict whose key is a tuple of twice a tuple of twice ..., that takes for ever to hash."""
    return (
        b"\x80\x02})" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(levels)) + b"K\x01s."
    )


def zip_of(data, compression=zipfile.ZIP_STORED, **members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, member in members.items():
            archive.writestr(f"archive/data/{name}", member)
    return file.getvalue()


DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R"
SET = b"cbuiltins\nset\n"
FUNCTION = b"ctorch._utils\n_rebuild_parameter\n"
STORAGE = (
    b"ctorch.storage\n_load_from_bytes\n" + pickle.dumps(storage(), protocol=3)[2:-1] + b"\x85R"
)
ATTACKS = {
    "os.system": lambda: pickle.dumps(Call(os.system, "touch executed")),
    "os.system in a zip": lambda: zip_of(
        pickle.dumps(Call(os.system, "touch executed"), protocol=2)
    ),
    "eval": lambda: pickle.dumps({"a": Call(eval, "open('executed', 'w')")}),
    "a name with a dot": lambda: b"\x80\x04\x8c\x05torch\x8c\x0d_utils.os.sys\x93.",
    "getattr": lambda: pickle.dumps(Call(getattr, "", "join")),
    "other globals": lambda: pickle.dumps(Call(io.BytesIO, b"")),
    "class outside torch.nn.modules": lambda: pickle.dumps(torch.optim.SGD),
    "extension registry": lambda: b"\x80\x02\x82\x01.",
    "changes a function": lambda: (
        b"\x80\x02" + FUNCTION + b"}X\x05\x00\x00\x00_callcbuiltins\nset\nsb."
    ),
    "changes slots of a function": lambda: (
        b"\x80\x02" + FUNCTION + b"N}X\x05\x00\x00\x00_callK\x01s\x86b."
    ),
    "changes a class": lambda: (
        b"\x80\x02ctorch.nn.modules.linear\nLinear\n}X\x07\x00\x00\x00__new__K\x01sb."
    ),
    "changes dict": lambda: b"\x80\x02ccollections\nOrderedDict\n}X\x06\x00\x00\x00updateK\x01sb.",
    "enlarges a storage": lambda: (
        b"\x80\x03" + STORAGE + b"N}X\x06\x00\x00\x00nbytesJ\x00\x00\x00\x40s\x86b."
    ),
    "deep tuples": lambda: nested_tuples(10**5),
    "deep tuple as a key": lambda: nested_tuples(10**5, key=True),
    "deep lists": lambda: b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "lists deepened later": lambda: (
        b"\x80\x04("
        + b"".join(b"]r" + struct.pack("<i", i) for i in range(3000))
        + b"l"
        + b"".join(
            b"j" + struct.pack("<i", i) + b"j" + struct.pack("<i", i + 1) + b"a0"
            for i in range(2999)
        )
        + b"."
    ),
    "laughs": lambda: laughs(60),
    "many laughs": lambda: laughs(20)[:-1] + b"h\x13K\x01s" * 10**5 + b".",
    "tuple in itself": lambda: b"\x80\x02]q\x00h\x00\x85q\x01a0h\x01.",
    "huge memo": lambda: b"\x80\x02]r\xff\xff\xff\x7f.",
    "huge bytes": lambda: b"\x80\x04\x8e" + struct.pack("<q", 2**40) + b"abc.",
    "huge byte array": lambda: b"\x80\x05\x96" + struct.pack("<q", 2**36) + b"abc.",
    "huge frame": lambda: b"\x80\x04\x95" + struct.pack("<q", 2**40) + b"].",
    "copies": lambda: (
        b"\x80\x02](" + b"K\x01" * 1000 + b"e\x85q\x00" + (SET + b"h\x00R0") * 1000 + b"N."
    ),
    "storage in a storage": lambda: tensor_of(0, (1,), (1,), tensor_of(0, (1,), (1,))),
    "storage that is none": lambda: tensor_of(0, (1,), (1,), pickle.dumps([1])),
    "a storage again and again": lambda: (
        b"\x80\x03]("
        + pickle.dumps(storage(), protocol=3)[2:-1]
        + b"q\x000"
        + b"ctorch.storage\n_load_from_bytes\nq\x010"
        + b"h\x01h\x00\x85R0" * 1000
        + b"e."
    ),
    "keys of one hash": lambda: pickle.dumps({k * (2**61 - 1): 0 for k in range(1, 100)}),
    "many operations": lambda: b"\x80\x02" + b"}0" * 600_000 + b"N.",
    "stride 0": lambda: tensor_of(0, (2**20, 2**20), (0, 0)),
    "stride 0, too many elements": lambda: tensor_of(0, (5,), (0,)),
    "offset": lambda: tensor_of(1, (4,), (1,)),
    "stride": lambda: tensor_of(0, (2,), (4,)),
    "negative stride": lambda: tensor_of(3, (2,), (-1,)),
    "negative offset": lambda: tensor_of(-1, (2,), (1,)),
    "many dimensions": lambda: tensor_of(0, (1,) * 100, (1,) * 100),
    "huge storage": lambda: tensor_of(0, (1,), (1,), storage(numel=2**50)),
    "storage with little data": lambda: tensor_of(0, (1,), (1,), storage(data=b"")),
    "array of objects": lambda: pickle.dumps(np.array([None, {}])),
    "array larger than its data": lambda: (
        b"\x80\x03cnumpy.core.multiarray\n_reconstruct\n)R(K\x01J\x00\x00\x00\x40\x85"
        + DTYPE
        + b"\x89C\x04abcdtb."
    ),
    "array never filled": lambda: b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.",
    "function as a value": lambda: b"\x80\x02" + FUNCTION + b".",
    "function as a key": lambda: b"\x80\x02}" + FUNCTION + b"K\x01s.",
    "compressed zip": lambda: zip_of(pickle.dumps(bytes(10**6)), zipfile.ZIP_DEFLATED),
    "not a pickle": lambda: b"<!DOCTYPE html><html>Not found</html>",
    "empty": lambda: b"",
    "no STOP": lambda: b"\x80\x02]",
    "empty zip": lambda: zip_of(b""),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    path = put(tmp_path / "weights.pkl", ATTACKS[attack]())
    with pytest.raises(
        ValueError, match=r"weights\.pkl (.*Do not trust|is missing, truncated)"
    ) as error:
        pickles.read(path)
    assert type(error.value) is ValueError and len(str(error.value)) < 600
    assert os.listdir(tmp_path) == ["weights.pkl"]


def test_refusal_names_what_was_asked_for(tmp_path):
    path = put(tmp_path / "a.pkl", pickle.dumps(Call(os.system, "true")))
    with pytest.raises(
        ValueError, match=r"refers to 'posix\.system', which is no part of a weight file"
    ):
        pickles.read(path)


@pytest.mark.parametrize("kind", ["snapshot", "zip", "legacy", "numpy"])
def test_damaged_files(layout, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    tensors = {
        "model.map_layer0.weight": np.ones((2, 3), np.float32),
        "model.enc.a.bias": np.ones(3, np.float32),
    }
    file = io.BytesIO()
    if kind == "snapshot":
        file.write(snapshot(tensors))
    elif kind == "numpy":
        pickle.dump(tensors, file)
    else:
        content = {name: torch.tensor(t) for name, t in tensors.items()}
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    data, path, rng = file.getvalue(), tmp_path / "a.pkl", np.random.default_rng(0)
    pickles.read(put(path, data))
    for cut in rng.integers(0, len(data) - 1, 60):
        with pytest.raises(ValueError, match=r"truncated|trust"):
            pickles.read(put(path, data[:cut]))
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            pickles.read(put(path, bytes(damaged)))  # what changes a value cannot be told
        except ValueError as error:
            assert type(error) is ValueError and str(error).startswith(str(path))
    assert os.listdir(tmp_path) == ["a.pkl"]


def test_state_dict_refuses_what_is_no_module():
    def module(**more):
        return pickles.Stub("Module", {"_parameters": {}, "_buffers": {}, "_modules": {}} | more)

    circle = module()
    circle.state["_modules"] = {"a": circle, "b": circle}
    shared = {str(i): None for i in range(1000)}  # names are counted, not only modules
    with pytest.raises(ValueError, match="nest too deep"):
        pickles.state_dict(
            module(_modules={str(i): module(_parameters=shared) for i in range(200)})
        )
    for wrong in (
        circle,
        {},
        None,
        pickles.Stub("Loss", {"P_mean": 1.0}),
        module(_parameters=[]),
        module(_parameters={"a": "b"}),
    ):
        with pytest.raises(ValueError, match="expected"):
            pickles.state_dict(wrong)
    hidden = module(
        _buffers={"a": np.zeros(1), "b": np.zeros(1), "c": None},
        _non_persistent_buffers_set={"b"},
        _modules={"d": None},
    )
    assert list(pickles.state_dict(hidden)) == ["a"]
