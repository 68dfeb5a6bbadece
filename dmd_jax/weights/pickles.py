"""Weight files of PyTorch and pickles of numpy arrays, without PyTorch.

They are read without running anything in them. Every name in a pickle is looked up among this
module's own objects, so a pickle can neither call nor change anything else. Its opcodes are checked
before it is built: some are refused, and so is nesting that would exhaust the stack or the memory.
"""

import io
import math
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from dmd_jax.runtime import storage as storage_lib

MAGIC = 0x1950A86A20F9469CFC6C  # the beginning of torch.save's files before it wrote zip archives
DTYPES = {  # numpy's name: the beginning of the storage's
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
}
REFUSED = {
    "EXT1",
    "EXT2",
    "EXT4",
    "INST",
    "OBJ",
    "NEWOBJ_EX",
    "PERSID",
    "DUP",
    "FROZENSET",
    "NEXT_BUFFER",
    "READONLY_BUFFER",
}
CHANGING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
MAX_NESTING, MAX_NODES, MAX_OPCODES, MAX_NAMES = 200, 10**7, 10**6, 10**5


class Stub:
    """An object of a class that was not imported: the name of the class, and the object's state."""

    __slots__ = ("class_name", "state")

    def __init__(self, class_name: str, state: Any):
        self.class_name, self.state = class_name, state

    def __setstate__(self, state):
        self.state = state[0] if isinstance(state, tuple) and len(state) == 2 else state


def read(path: str | os.PathLike) -> Any:
    """Reads a pickle or a file of torch.save.

    Returns:
      Nested containers of plain values, read-only arrays in place of tensors, and a `Stub` for
      every other object that is allowed.

    Raises:
      ValueError: the file is damaged, or refers to anything but weights.
    """
    path = storage_lib.local(path)
    try:
        data = path.read_bytes()
        return _resolve(
            _read_zip(data) if data.startswith(b"PK\x03\x04") else _read_stream(data), {}
        )
    except _Refused as error:
        raise ValueError(
            f"{path} {str(error)[:300]}. Do not trust this file; nothing in it was run."
        ) from None
    except Exception as error:  # pickle and zipfile raise many kinds for damaged files
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise ValueError(
            f"{path} is missing, truncated or not a weight file ({reason}); download it again."
        ) from error


def state_dict(stub: Stub) -> dict[str, np.ndarray]:
    """Returns the parameters and buffers of a PyTorch module by their dotted names.

    Raises:
      ValueError: `stub` is not a module, or its modules nest without end.
    """
    tensors, todo, visited = {}, [("", stub, 0)], 0
    while todo:
        prefix, module, depth = todo.pop()
        where = prefix.rstrip(".") or "the root"
        if depth > 32 or visited > MAX_NAMES:
            raise ValueError(
                f"the modules below {where[:100]} nest too deep, or contain themselves; "
                "expected a network of PyTorch."
            )
        state = module.state if isinstance(module, Stub) else None
        parts = (
            [state.get(key) for key in ("_parameters", "_buffers", "_modules")]
            if isinstance(state, dict)
            else []
        )
        if not parts or not all(isinstance(part, dict) for part in parts):
            raise ValueError(
                f"{where} is a {getattr(module, 'class_name', type(module).__name__)}, "
                "expected a module of PyTorch."
            )
        visited += 1 + len(parts[0]) + len(parts[1])
        hidden = state.get("_non_persistent_buffers_set") or ()
        for name, tensor in [
            *parts[0].items(),
            *((k, v) for k, v in parts[1].items() if k not in hidden),
        ]:
            if tensor is not None and not isinstance(tensor, np.ndarray):
                raise ValueError(
                    f"{prefix}{name} is a {type(tensor).__name__}, expected a tensor; "
                    "this is not a network of PyTorch."
                )
            if tensor is not None:
                tensors[f"{prefix}{name}"] = tensor
        todo += [
            (f"{prefix}{name}.", child, depth + 1)
            for name, child in reversed(parts[2].items())
            if child is not None
        ]
    return tensors


class _Refused(Exception):
    """Something that no weight file does."""


class _Function:
    """A function that a file may call; BUILD cannot change it."""

    __slots__ = ("_call",)

    def __init__(self, call):
        self._call = call

    def __call__(self, *args):
        return self._call(*args)

    def __setstate__(self, state):
        raise _Refused("changes a function")


class _Dict(dict):
    """Stands for OrderedDict and EasyDict; attributes are dropped."""

    __slots__ = ()

    def __init__(self):  # items come one by one, not as arguments
        super().__init__()

    def __setstate__(self, state):
        pass


class _Module:
    """The base of the classes that stand for PyTorch's modules, and make stubs."""

    __slots__ = ()

    def __new__(cls, *args):
        return Stub(cls.__name__, {})

    # BUILD finds it on the class itself, and calls it with too few arguments.
    def __setstate__(self, state):
        raise _Refused("changes a class")


class _Dtype:
    """A dtype that can change, which numpy's pickles need; also stands for PyTorch's storages."""

    __slots__ = ("dtype",)

    def __init__(self, name, *_):
        self.dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        if name != "bfloat16" and self.dtype.kind not in "biuf":
            raise _Refused(f"holds arrays of dtype {name!r}, expected numbers")

    def __setstate__(self, state):
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """An array of numpy, which exists before its contents are known."""

    __slots__ = ("state",)

    def __init__(self, *_):
        self.state = None

    def __setstate__(self, state):
        self.state = state

    def resolve(self):
        _, shape, dtype, fortran, data = self.state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
            raise _Refused("holds an array of objects, expected numbers")
        return np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")


class _Storage:
    """Memory that tensors share; `data` [bytes] is filled in last."""

    __slots__ = ("data", "dtype", "nbytes")

    def __init__(self, dtype, numel):
        self.dtype, self.nbytes, self.data = dtype.dtype, _count(numel) * dtype.dtype.itemsize, None

    def __setstate__(self, state):
        raise _Refused("changes a storage")

    def resolve(self):
        return self.data.view(self.dtype)


class _Tensor:
    """A view of a storage."""

    __slots__ = ("_args",)

    def __init__(
        self, storage, offset, size, stride, requires_grad, hooks, dtype=None, metadata=None
    ):
        dtype = storage.dtype if dtype is None else dtype.dtype
        if max(len(size), len(stride)) > 32:
            raise _Refused(f"holds a tensor of {len(size)} dimensions")
        self._args = (
            storage,
            dtype,
            _count(offset),
            [_count(n) for n in size],
            [_count(n) for n in stride],
        )

    def __setstate__(self, state):
        raise _Refused("changes a tensor")

    def resolve(self):
        storage, dtype, offset, size, stride = self._args
        available, last = (
            storage.data.size // dtype.itemsize,
            offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)),
        )
        if math.prod(size) > available or (0 not in size and last >= available):
            raise _Refused(
                f"holds a tensor of shape {tuple(size)} that reaches outside its storage "
                f"of {available} elements"
            )
        if 0 in size:
            return np.zeros(size, dtype)
        flat = storage.data[: available * dtype.itemsize].view(dtype)
        return np.lib.stride_tricks.as_strided(
            flat[offset:], size, [s * dtype.itemsize for s in stride], writeable=False
        )


def _array(data, dtype, shape, order):
    array = _Array()
    array.state = 1, shape, dtype, order == "F", data
    return array


def _count(n):
    if type(n) is not int or not 0 <= n < 2**62:
        raise _Refused(f"gives {str(n)[:40]} as a number of elements")
    return n


CALLS: dict[str, Callable] = {
    f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")
}
CALLS |= {
    f"numpy.{core}.multiarray.scalar": lambda d, b: np.frombuffer(b, d.dtype)[0].item()
    for core in ("core", "_core")
}
CALLS |= {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": lambda *_: None,
    "torch.device": lambda kind, *_: kind,
}
CALLS |= {f"torch._utils._rebuild_tensor_v{n}": _Tensor for n in (2, 3)} | {
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor
}
CALLS |= {f"numpy.{core}.numeric._frombuffer": _array for core in ("core", "_core")}
CALLS |= {f"{builtins}.bytes": lambda: b"" for builtins in ("builtins", "__builtin__")}
CLASSES = {
    "collections.OrderedDict": _Dict,
    "dnnlib.util.EasyDict": _Dict,
    "dnnlib.EasyDict": _Dict,
}
STORAGES = {
    f"{module}.{start}Storage": name
    for name, start in DTYPES.items()
    for module in ("torch", "torch.cuda")
}
STORAGES |= {f"{module}.UntypedStorage": "uint8" for module in ("torch", "torch.storage")}
STORAGES |= {f"torch.{name}": name for name in (*DTYPES, "uint16", "uint32", "uint64")}


class _Unpickler(pickle.Unpickler):
    """Builds one pickle after `_scan` has let it pass.

    Args:
      budget: a list of the number of bytes that may still be copied. A file can refer to the same
        bytes many times, and would multiply them.
      nested: whether this pickle is a storage inside another one.
    """

    def __init__(self, file, *, budget, nested=False):
        super().__init__(file)
        self.storages, self._types, self._budget, self._nested = {}, {}, budget, nested

    def find_class(self, module, name):
        full = f"{module}.{name}"
        own = {
            "torch.storage._load_from_bytes": self._load_from_bytes,
            "torch.Size": self._copy(tuple),
            "_codecs.encode": self._encode,
        }
        own |= {"torch_utils.persistence._reconstruct_persistent_obj": _persistent}
        own |= {f"{builtins}.set": self._copy(set) for builtins in ("builtins", "__builtin__")}
        if full in CLASSES:
            return CLASSES[full]
        if full in STORAGES:
            return _Dtype(STORAGES[full])
        if full.startswith("torch.nn.modules."):
            return self._types.setdefault(full, type(name, (_Module,), {"__slots__": ()}))
        if full not in CALLS and full not in own:
            raise _Refused(f"refers to {full[:200]!r}, which is no part of a weight file")
        return _Function(CALLS.get(full) or own[full])

    def persistent_load(self, pid):
        if pid[0] == "module":  # the source of its class comes with it and is not used
            return pid[1]
        kind, dtype, key, _, numel, *view = pid
        if (
            kind != "storage"
            or not isinstance(dtype, _Dtype)
            or not isinstance(key, str)
            or any(v is not None for v in view)
        ):
            raise _Refused("refers to something outside itself that is not a storage")
        return self.storages.setdefault(key, _Storage(dtype, numel))

    def _load_from_bytes(self, data):
        if self._nested or not isinstance(data, bytes):
            raise _Refused("nests storages in storages")
        storage = _read_stream(self._spend(data), budget=self._budget, nested=True)
        if not isinstance(storage, _Storage):
            raise _Refused("holds a storage that is none")
        return storage

    def _copy(self, kind):
        return lambda items=(): kind(self._spend(items))

    def _encode(self, text, encoding):
        if encoding not in ("latin1", "latin-1"):
            raise _Refused(f"uses the encoding {str(encoding)[:40]!r}, expected latin1")
        return self._spend(text).encode("latin1")

    def _spend(self, items):
        self._budget[0] -= len(items)
        if self._budget[0] < 0:
            raise _Refused("unfolds to more than twice its own size")
        return items


def _persistent(meta):
    """Returns the stub of an object that comes with the source of its class, which is not used."""
    if meta["type"] != "class" or not isinstance(meta["class_name"], str):
        raise _Refused("holds source code that is not a class")
    return Stub(meta["class_name"], meta["state"])


def _read_stream(data, *, budget=None, nested=False):
    """Reads a plain pickle, or torch.save's format before zip archives.

    That format has pickles, and then the contents of the storages.
    """
    file = io.BytesIO(data)
    budget = [2 * len(data)] if budget is None else budget  # protocol 2 spends a storage twice
    first, _ = _load(file, budget=budget, nested=nested)
    if type(first) is not int or first != MAGIC:
        return first
    version, info = (_load(file, budget=budget, nested=nested)[0] for _ in range(2))
    if version != 1001 or not info["little_endian"]:
        raise ValueError(f"version {version} of its format, expected 1001, little endian")
    result, storages = _load(file, budget=budget, nested=nested)
    for key in _load(file, budget=budget, nested=nested)[0]:
        storage, start = storages.pop(key), file.tell() + 8
        if (
            int.from_bytes(data[start - 8 : start], "little") * storage.dtype.itemsize
            != storage.nbytes
        ):
            raise ValueError(f"storage {key} has another size than announced")
        storage.data = (
            np.frombuffer(data, np.uint8, storage.nbytes, start)
            if storage.nbytes
            else np.zeros(0, np.uint8)
        )
        file.seek(start + storage.nbytes)
    if storages:
        raise ValueError(f"storages {sorted(storages)[:5]} are missing")
    return result


def _read_zip(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(
            m.file_size for m in members
        ) > len(data):
            raise _Refused("is compressed, which torch.save does not do")
        (name,) = [
            m.filename
            for m in members
            if m.filename.count("/") == 1 and m.filename.endswith("/data.pkl")
        ]
        folder = name.removesuffix("data.pkl")
        if (
            folder + "byteorder" in archive.namelist()
            and archive.read(folder + "byteorder") != b"little"
        ):
            raise ValueError("big endian, expected little endian")
        result, storages = _load(io.BytesIO(archive.read(name)), budget=[len(data)], nested=False)
        for key, storage in storages.items():
            storage.data = np.frombuffer(archive.read(f"{folder}data/{key}"), np.uint8)
            if storage.data.size != storage.nbytes:
                raise ValueError(
                    f"storage {key} has {storage.data.size} bytes, expected {storage.nbytes}"
                )
    return result


def _load(file, *, budget, nested):
    """Reads the next pickle of `file`, and the storages that it refers to."""
    start = file.tell()
    _scan(file)
    end = file.tell()
    file.seek(start)
    unpickler = _Unpickler(file, budget=budget, nested=nested)
    result = unpickler.load()
    file.seek(end)
    return result, unpickler.storages


def _scan(file):
    """Checks a pickle's opcodes, and the depth and the unfolded size of what each would build.

    To hash a tuple takes as much stack as its depth and as much time as its unfolded number of
    nodes, and Python checks neither. A number in the memo makes the unpickler reserve memory up to
    that number.
    """
    stack, memo, work = [], {}, 0
    for count, (op, arg, _) in enumerate(pickletools.genops(file)):
        if op.name in REFUSED:
            raise _Refused(f"uses {op.name}, which no weight file needs")
        if count > MAX_OPCODES:
            raise _Refused(f"has more than {MAX_OPCODES} operations, more than any weight file")
        # Large integers as keys can be made to have one hash.
        if isinstance(arg, int) and abs(arg) >= 2**63 and arg != MAGIC:
            raise _Refused("holds an integer of more than 64 bits")
        if op.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(memo) if arg is None else arg
            if not 0 <= index <= count:
                raise _Refused(f"numbers an object {index}")
            memo[index] = stack[-1]
        elif op.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op.name == "MARK":
            stack.append(None)
        elif op.stack_before or op.stack_after:
            parts, fixed = [], len(op.stack_before)
            if pickletools.markobject in op.stack_before:
                fixed = op.stack_before.index(pickletools.markobject)
                while (part := stack.pop()) is not None:
                    parts.append(part)
            parts = [stack.pop() for _ in range(fixed)][::-1] + parts
            if not op.stack_after:
                continue
            whole, parts = (parts[0], parts[1:]) if op.name in CHANGING else ([0, 1], parts)
            whole[:] = (
                max(whole[0], *(1 + part[0] for part in parts), 0),
                whole[1] + sum(part[1] for part in parts),
            )
            work += sum(part[1] for part in parts)
            if whole[0] > MAX_NESTING or whole[1] > MAX_NODES or work > 10 * MAX_NODES:
                raise _Refused("nests more objects in one another than any weight file")
            stack.append(whole)


def _resolve(value, done):
    """Returns `value` with arrays in place of what stands for them.

    Containers are changed in place, because they may contain themselves.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | bytearray):
        return value
    if id(value) in done:
        if done[id(value)][1] is done:
            raise _Refused("holds a tuple that contains itself")
        return done[id(value)][1]
    done[id(value)] = value, value  # the first one keeps the id in use
    if isinstance(value, _Array | _Storage | _Tensor):
        done[id(value)] = value, value.resolve()
    elif isinstance(value, _Dtype):
        done[id(value)] = value, value.dtype
    elif isinstance(value, type) and issubclass(value, _Module):
        done[id(value)] = value, Stub(value.__name__, None)
    elif isinstance(value, tuple | set):
        done[id(value)] = value, done
        done[id(value)] = value, type(value)([_resolve(v, done) for v in value])
    elif isinstance(value, Stub):
        value.state = _resolve(value.state, done)
    elif isinstance(value, list):
        value[:] = [_resolve(v, done) for v in value]
    elif isinstance(value, dict):
        if not all(k is None or isinstance(k, bool | int | float | str | bytes) for k in value):
            raise _Refused("has keys that are no plain values")
        plain = {} if isinstance(value, _Dict) else value
        done[id(value)] = value, plain
        plain.update((k, _resolve(v, done)) for k, v in value.items())
    else:
        raise _Refused(f"holds a {type(value).__name__.lstrip('_')} as a value")
    return done[id(value)][1]
