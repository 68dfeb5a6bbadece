"""Files in directories or in Google Cloud Storage: any path may be gs://bucket/name.

Code that reads and writes files sees local ones: `local` copies files from a bucket, once per host,
and `writing` sends files to it. A bucket has no directories, only objects with "/" in their names.
An object appears at once with all its bytes, and nothing can be appended to it.
"""

import contextlib
import fcntl
import fnmatch
import functools
import glob
import hashlib
import importlib.util
import json
import logging
import math
import os
import pathlib
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import fsspec
from etils import epath

GCS = "gs://"
CACHE_GB = 500  # of copies, if DMD_CACHE_GB says nothing else
ORIGIN = "origin.txt"  # in a copy: of what
BEAT = 20.0  # seconds between two signs of life of who holds an object
EVERY = 10.0  # seconds between two copies of one file; Google allows one a second
if TYPE_CHECKING:
    Path = pathlib.Path  # epath's has the same methods
else:
    Path = pathlib.Path | epath.Path

# Otherwise epath would use TensorFlow if it is installed.
os.environ.setdefault("EPATH_USE_TF", "false")
# Other hosts write to the bucket, too.
fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)


def path(name: str | os.PathLike) -> Path:
    """Returns the path of that name; a leading ~ is the home directory.

    Raises:
      ValueError: it is in a bucket that cannot be read, or in a storage of another kind.
    """
    if is_remote(name):
        _check_bucket(os.fspath(name).removeprefix(GCS).split("/")[0])
        return epath.Path(name)
    if re.match(r"\w+://", os.fspath(name)):
        raise ValueError(
            f"{name} is of an unknown kind; expected the name of a file or a directory, "
            f"or one that begins with {GCS}."
        )
    return pathlib.Path(name).expanduser()


def absolute(name: str | os.PathLike) -> Path:
    """Returns the absolute path of that name, see `path`."""
    return path(name) if is_remote(name) else path(name).absolute()


def is_remote(name: str | os.PathLike) -> bool:
    """Tells whether it is in a bucket."""
    return os.fspath(name).startswith(GCS)


def has_parent(name: str | os.PathLike) -> bool:
    """Tells whether a file can be made there: its directory exists, or it is in a bucket."""
    return is_remote(name) or absolute(name).parent.is_dir()


def free(name: str | os.PathLike) -> float:
    """Returns the free bytes of a directory."""
    return math.inf if is_remote(name) else shutil.disk_usage(path(name)).free


def remove(name: str | os.PathLike):
    """Removes a file, or a directory with all that is in it, if it exists."""
    target = path(name)
    if is_remote(target):
        epath.Path(target).rmtree(missing_ok=True)
    elif target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def local(name: str | os.PathLike, patterns: Sequence[str] = ("*",)) -> Path:
    """Returns a local file or directory to read from: itself, or a copy if it is in a bucket.

    A copy is made once per host and state of the objects, below ~/.cache/dmd_jax or DMD_CACHE. It
    has the same name, in a directory of its own. It is complete even if several processes ask for
    it at the same time. A path that does not exist is returned as it is: the code that opens it
    raises the error.

    Args:
      name: of a file or a directory.
      patterns: names below a directory that are copied; * matches any number of folders.

    Raises:
      ValueError: there is no room for the copy, or the name of an object cannot be a file's name.
    """
    source = path(name)
    sizes = _sizes(source, patterns) if is_remote(source) else {}
    if not sizes:
        return source
    directory = cache("files")
    state = json.dumps([str(source), sorted(sizes.items())])
    key = hashlib.sha256(state.encode()).hexdigest()[:24]
    copy = directory / key
    while not _use(copy):
        with _lock_of(copy).open("w") as lock:
            try:  # not to wait in it for those who use the copy once it is there
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
                continue
            if not copy.exists():
                _make_copy(source, list(sizes), copy, sum(size for size, _ in sizes.values()))
    return copy / source.name


def _make_copy(source, files, copy, total):
    partial = copy.with_suffix(".partial")
    remove(partial)
    make_room(total)
    if total > free(copy.parent):
        raise ValueError(
            f"a copy of {source} needs {_readable(total)}, but {copy.parent} has "
            f"{_readable(free(copy.parent))} free; make room, or set DMD_CACHE to another "
            "directory."
        )
    _storage().get(
        [str(source / file) for file in files],
        [str(partial / source.name / file) for file in files],
    )
    (partial / ORIGIN).write_text(str(source))
    partial.rename(copy)
    print(f"copied {source} ({_readable(total)}) to {copy}", file=sys.stderr, flush=True)


def _use(copy):
    """Whether a copy is there; nobody removes it as long as this process lives."""
    if not copy.exists():
        return False
    fcntl.flock(_kept_open(_lock_of(copy)), fcntl.LOCK_SH)
    if not copy.exists():
        _kept_open.cache_clear()
        return False
    os.utime(copy)
    return True


def _lock_of(copy):
    return copy.with_suffix(".lock")


@functools.cache
def _kept_open(path):
    return path.open("w")


class Copy(NamedTuple):
    """A copy of what is in a bucket.

    Attributes:
      path: of its directory.
      source: of which it is a copy.
      size: in bytes.
      used: when it was last asked for, in seconds since 1970.
    """

    path: pathlib.Path
    source: str
    size: int
    used: float


def copies() -> list[Copy]:
    """Lists the copies in the cache, those that were used last at the end."""
    found = []
    for origin in cache("files").glob(f"*/{ORIGIN}"):
        path = origin.parent
        if path.suffix != ".partial":
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            found.append(Copy(path, origin.read_text(), size, path.stat().st_mtime))
    return sorted(found, key=lambda copy: copy.used)


def remove_copy(copy: Copy) -> bool:
    """Removes a copy; returns whether it could, as no process uses it."""
    with _lock_of(copy.path).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        remove(copy.path)
    return True


def make_room(size: float):
    """Removes copies that no process uses until `size` more bytes are within DMD_CACHE_GB."""
    limit = 1e9 * float(os.environ.get("DMD_CACHE_GB", CACHE_GB))
    there = copies()
    excess = sum(copy.size for copy in there) + size - limit
    for copy in there:
        if excess > 0 and remove_copy(copy):
            excess -= copy.size


def cache(name: str) -> pathlib.Path:
    """Makes a directory for files that can be made again, below ~/.cache/dmd_jax or DMD_CACHE."""
    directory = pathlib.Path(os.environ.get("DMD_CACHE", "~/.cache/dmd_jax")).expanduser() / name
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextlib.contextmanager
def writing(name: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a local path to write a file or a directory to; at the end it becomes `name`.

    The path has the suffix of `name`. The write is atomic, except for a directory in a bucket: its
    files appear one by one, those at the top level last.

    Raises:
      OSError: it cannot be written.
    """
    target = path(name)
    if is_remote(target):
        with tempfile.TemporaryDirectory(prefix="dmd_jax-") as folder:
            new = pathlib.Path(folder, target.name)
            yield new
            files = [file for file in new.rglob("*") if file.is_file()] if new.is_dir() else [new]
            for file in sorted(files, key=lambda file: len(file.parts), reverse=True):
                _send(file, target / file.relative_to(new))
        return
    # Several processes may write the same file, also on several hosts.
    for old in target.parent.glob(f"partial-*-{glob.escape(target.name)}"):
        if _is_left(old):
            remove(old)
    thread = threading.get_ident()
    new = target.with_name(f"partial-{socket.gethostname()}-{os.getpid()}-{thread}-{target.name}")
    try:
        yield new
        _to_disk(new)
        new.rename(target)
        _sync(target.parent)
    finally:
        remove(new)


def _is_left(partial):
    """Whether the process of this host that has begun a file was killed."""
    found = re.match(rf"partial-{re.escape(socket.gethostname())}-(\d+)-", partial.name)
    return found is not None and not pathlib.Path(f"/proc/{found[1]}").exists()


def _to_disk(new):
    """Without it a file that is there after a power cut may be empty."""
    for path in [new, *new.rglob("*")] if new.is_dir() else [new]:
        _sync(path)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(name: Path, holder: bytes) -> Iterator[None]:
    """Holds an object of a bucket, as a lock, within this context.

    Who holds it writes it anew every BEAT seconds. An object that nobody writes is left from a
    holder that was killed; to know it takes two BEATs.

    Args:
      name: of the object.
      holder: its content.

    Raises:
      ValueError: somebody else holds it.
    """
    before = _generation(name)
    if before is not None:
        print(f"{name} is there; waiting whether its holder lives.", file=sys.stderr, flush=True)
        deadline = time.monotonic() + 2 * BEAT
        while time.monotonic() < deadline and _generation(name) == before:
            time.sleep(BEAT / 20)
        if _generation(name) == before:
            remove(name)
    try:
        _storage().pipe_file(str(name), holder, mode="create")
    except Exception as error:  # gcsfs, aiohttp and google.auth raise all kinds
        if _generation(name) is None:
            raise OSError(f"{name} cannot be written ({_reason(error)}).") from error
        raise ValueError(
            f"{name.parent} is in use by another run, {name.read_bytes().decode()}; "
            "wait for its end, or stop it."
        ) from error
    ended = threading.Event()

    def beat():
        while not ended.wait(BEAT):
            with contextlib.suppress(Exception):
                _storage().pipe_file(str(name), holder)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        remove(name)


def _generation(name):
    """The number of an object's content; None if there is no object."""
    try:
        return _storage().info(str(name))["generation"]
    except FileNotFoundError:
        return None


class Growing:
    """A directory whose files grow.

    Attributes:
      path: where the files are written: the directory itself, or a local one whose files are copied
        to the bucket.
    """

    def __init__(self, directory: str | os.PathLike):
        self._directory = path(directory)
        self._folder = None
        self._states = {}  # of the files at their last copy
        self._last_copy = -math.inf
        self.path = self._directory
        if is_remote(directory):
            self._folder = tempfile.TemporaryDirectory(prefix="dmd_jax-")
            self.path = pathlib.Path(self._folder.name)
        self.path.mkdir(parents=True, exist_ok=True)

    def grown(self):
        """Copies the files that have changed, if the last copy is EVERY seconds old."""
        if time.monotonic() > self._last_copy + EVERY:
            self.flush()

    def flush(self):
        """Copies the files that have changed."""
        if self._folder:
            for file in self.path.rglob("*"):
                if file.is_file():
                    self._copy(file)
        self._last_copy = time.monotonic()

    def _copy(self, file):
        stat = file.stat()
        state = (stat.st_size, stat.st_mtime_ns)
        if self._states.get(file) != state:
            _send(file, self._directory / file.relative_to(self.path))
            self._states[file] = state

    def close(self):
        """Copies the files that have changed, and ends."""
        self.flush()
        if self._folder:
            self._folder.cleanup()


@functools.cache
def _check_bucket(bucket):
    """Checks that a bucket can be listed, and raises ValueError if not."""
    if not bucket:
        raise ValueError(f"{GCS} has no bucket; expected {GCS}bucket/name.")
    if not importlib.util.find_spec("gcsfs"):
        raise ValueError(
            f"{GCS}{bucket} is in Google Cloud Storage, which needs a package; "
            'run: pip install "dmd_jax[gcs]"'
        )
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises
    try:
        _storage().ls(bucket, max_results=1)
    except FileNotFoundError:
        raise ValueError(
            f"{GCS}{bucket} does not exist; make that bucket first, or check its name."
        ) from None
    except Exception as error:  # gcsfs, aiohttp and google.auth raise all kinds
        raise ValueError(
            f"{GCS}{bucket} cannot be read ({_reason(error)}); log in by `gcloud auth "
            "application-default login`, or give the account of this machine the role Storage "
            "Object User of the bucket."
        ) from error


def _storage():
    """Returns the file system that epath uses; epath itself has no generations of objects."""
    return fsspec.filesystem("gcs", finalize_on_close=True)


def _sizes(source, patterns):
    """Returns {name below `source`: (bytes, generation)}, empty if there are no objects.

    If `source` itself is an object, its name is "".
    """
    try:
        info = _storage().info(str(source))
    except FileNotFoundError:
        return {}
    if info["type"] == "file":
        return {"": (info["size"], info["generation"])}
    sizes = {}
    start = str(source).removeprefix(GCS).rstrip("/") + "/"
    for name, info in _storage().find(str(source), detail=True).items():
        file = name.removeprefix(start)
        if file.startswith("/") or ".." in file.split("/"):
            raise ValueError(
                f"{source} has an object {file!r}, which is no name of a file; remove it."
            )
        matches = any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)
        if matches and not file.endswith("/"):
            sizes[file] = info["size"], info["generation"]
    return sizes


def _send(file, target):
    try:
        _storage().put_file(str(file), str(target))
    except Exception as error:  # gcsfs, aiohttp and google.auth raise all kinds
        raise OSError(f"{target} cannot be written ({_reason(error)}).") from error


def _reason(error):
    """Returns the error's text in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _readable(size):
    """Writes a number of bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def wait_for(path: Path, seconds: float = 60.0):
    """Waits until a path appears that another host has made: a network's file system may be late.

    Raises:
      OSError: it does not.
    """
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise OSError(
                f"{path} has not appeared for {seconds:.0f} s, though another process has it; "
                "give all processes one --workdir, on a file system that they share."
            )
        time.sleep(0.2)


def read_json(path: Path) -> dict:
    """Reads a JSON object.

    Raises:
      ValueError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} is damaged; expected a JSON object. Restore it, or delete it and run again."
        )
    return content


def write_json(path: Path, content: dict):
    """Writes a JSON object, atomically."""
    with writing(path) as file:
        file.write_text(json.dumps(content, indent=2) + "\n")
