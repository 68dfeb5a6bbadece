"""Files in directories or in Google Cloud Storage: a path may be gs://bucket/name wherever one is accepted.

What reads and writes files sees local ones: `local` copies what lies in a bucket once per host, `writing` sends there what was written.
A bucket has no directories but only objects with "/" in their names; an object appears whole, and nothing can be appended to it.
"""

import contextlib
import fcntl
import fnmatch
import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import fsspec
import jax
from etils import epath

GCS = "gs://"
EVERY = 10.0  # seconds between two copies of one file; Google allows one a second
Path = pathlib.Path | epath.Path

os.environ.setdefault(
    "EPATH_USE_TF", "false"
)  # where TensorFlow is installed, epath would go through it
fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)  # others write, too


def path(name: str | os.PathLike) -> Path:
    """The path of that name; a leading ~ is the home directory.

    Raises:
      ValueError: it is in a bucket that cannot be read, or in a storage of another kind.
    """
    if is_remote(name):
        _check_bucket(os.fspath(name).removeprefix(GCS).split("/")[0])
        return epath.Path(name)
    if re.match(r"\w+://", os.fspath(name)):
        raise ValueError(
            f"{name} is of an unknown kind; expected the name of a file or a directory, or one that begins with {GCS}."
        )
    return pathlib.Path(name).expanduser()


def absolute(name: str | os.PathLike) -> Path:
    """As `path`, absolute."""
    return path(name) if is_remote(name) else path(name).absolute()


def is_remote(name: str | os.PathLike) -> bool:
    """Whether it is in a bucket."""
    return os.fspath(name).startswith(GCS)


def has_parent(name: str | os.PathLike) -> bool:
    """Whether a file can be made there: its directory exists, which buckets have none of."""
    return is_remote(name) or absolute(name).parent.is_dir()


def free(name: str | os.PathLike) -> float:
    """The bytes that a directory has room for."""
    return math.inf if is_remote(name) else shutil.disk_usage(path(name)).free


def remove(name: str | os.PathLike):
    """Removes a file, or a directory with all that is in it, if it exists."""
    found = path(name)
    if is_remote(found):
        found.rmtree(missing_ok=True)
    elif found.is_dir():
        shutil.rmtree(found)
    else:
        found.unlink(missing_ok=True)


def local(name: str | os.PathLike, wanted: Sequence[str] = ("*",)) -> Path:
    """A local file or directory to read from: itself, or a copy of what lies in a bucket, under the same name in a directory of its own.

    A copy is made once per host and state of the objects, below ~/.cache/dmd_jax or DMD_CACHE. It is whole, also where several processes
    ask for it at a time. What does not exist is returned as it is: who opens it says so.

    Args:
      name: of a file or a directory.
      wanted: patterns of names below a directory, for the others not to be copied; * matches any number of folders.

    Raises:
      ValueError: there is no room for the copy, or an object's name is no file's.
    """
    source = path(name)
    sizes = _sizes(source, wanted) if is_remote(source) else {}
    if not sizes:
        return source
    directory = cache("files")
    key = hashlib.sha256(json.dumps([str(source), sorted(sizes.items())]).encode()).hexdigest()[:24]
    total, copy, partial = (
        sum(size for size, _ in sizes.values()),
        directory / key,
        directory / f"{key}.partial",
    )
    with (directory / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.exists():
            remove(partial)
            if total > free(directory):
                raise ValueError(
                    f"a copy of {source} needs {_readable(total)}, but {directory} has {_readable(free(directory))} free; make room, or "
                    "set DMD_CACHE to another directory."
                )
            _storage().get(
                [str(source / file) for file in sizes],
                [str(partial / source.name / file) for file in sizes],
            )
            partial.rename(copy)
            print(f"copied {source} ({_readable(total)}) to {copy}", file=sys.stderr, flush=True)
    return copy / source.name


def cache(name: str) -> pathlib.Path:
    """A directory for what can be made again, below ~/.cache/dmd_jax or DMD_CACHE."""
    directory = pathlib.Path(os.environ.get("DMD_CACHE", "~/.cache/dmd_jax")).expanduser() / name
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextlib.contextmanager
def writing(name: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A local path, with the suffix of `name`, to write a file or a directory to, which becomes `name` at the end.

    It does so whole or not at all, but that of a directory in a bucket the files appear one after another, those at its top last.

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
    process = (
        jax.process_index() if jax.distributed.is_initialized() else 0
    )  # several may write the same
    new = target.with_name(f"partial-{process}-{target.name}")
    remove(new)  # what was left when the machine went down
    try:
        yield new
        new.rename(target)
    finally:
        remove(new)


class Growing:
    """A directory whose files grow.

    Attributes:
      path: where to write them: the directory itself, or a local one whose files are copied to a bucket.
    """

    def __init__(self, directory: str | os.PathLike):
        self._directory, self._folder, self._sent, self._last = path(directory), None, {}, -math.inf
        if is_remote(directory):
            self._folder = tempfile.TemporaryDirectory(prefix="dmd_jax-")
        self.path = pathlib.Path(self._folder.name) if self._folder else self._directory
        self.path.mkdir(parents=True, exist_ok=True)

    def grown(self):
        """Copies what has changed, if the last time was a while ago."""
        if time.monotonic() > self._last + EVERY:
            self.flush()

    def flush(self):
        """Copies what has changed."""
        for file in self.path.rglob("*") if self._folder else ():
            if file.is_file() and self._sent.get(file) != (
                state := (file.stat().st_size, file.stat().st_mtime_ns)
            ):
                _send(file, self._directory / file.relative_to(self.path))
                self._sent[file] = state
        self._last = time.monotonic()

    def close(self):
        self.flush()
        if self._folder:
            self._folder.cleanup()


@functools.cache
def _check_bucket(bucket):
    """Raises ValueError unless it can be listed."""
    if not bucket:
        raise ValueError(f"{GCS} has no bucket; expected {GCS}bucket/name.")
    if not importlib.util.find_spec("gcsfs"):
        raise ValueError(
            f'{GCS}{bucket} is in Google Cloud Storage, which needs a package; run: pip install "dmd_jax[gcs]"'
        )
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises
    try:
        _storage().ls(bucket, max_results=1)
    except FileNotFoundError:
        raise ValueError(
            f"{GCS}{bucket} does not exist; make that bucket first, or check its name."
        ) from None
    except Exception as error:  # of gcsfs, aiohttp and google.auth
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"{GCS}{bucket} cannot be read ({reason}); log in by `gcloud auth application-default login`, or give the account of this "
            "machine the role Storage Object User of the bucket."
        ) from error


def _storage():
    """That of epath, which tells no generations."""
    return fsspec.filesystem("gcs", finalize_on_close=True)


def _sizes(source, wanted):
    """{name below `source`: (bytes, generation)}, with the name "" for an object of that very name; nothing if there is none."""
    try:
        found = _storage().info(str(source))
    except FileNotFoundError:
        return {}
    if found["type"] == "file":
        return {"": (found["size"], found["generation"])}
    sizes, start = {}, str(source).removeprefix(GCS).rstrip("/") + "/"
    for name, found in _storage().find(str(source), detail=True).items():
        file = name.removeprefix(start)
        if file.startswith("/") or ".." in file.split("/"):
            raise ValueError(
                f"{source} has an object {file!r}, which is no name of a file; remove it."
            )
        if not file.endswith("/") and any(fnmatch.fnmatchcase(file, pattern) for pattern in wanted):
            sizes[file] = found["size"], found["generation"]
    return sizes


def _send(file, target):
    try:
        _storage().put_file(str(file), str(target))
    except Exception as error:  # of gcsfs, aiohttp and google.auth
        raise OSError(
            f"{target} cannot be written ({' '.join(str(error).split())[:300] or type(error).__name__})."
        ) from error


def _readable(size):
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def read_json(path: Path) -> dict:
    """Raises ValueError if the file is damaged."""
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
    """Whole or not at all."""
    with writing(path) as file:
        file.write_text(json.dumps(content, indent=2) + "\n")
