"""Paths in a bucket: gcsfs and TensorStore talk to the server of tests/helpers/gcs.py."""

import concurrent.futures
import os
import pathlib
import re
import socket
import time

import numpy as np
import pytest

from dmd_jax.commands import cache
from dmd_jax.runtime import storage
from tests.helpers import gcs


@pytest.fixture(params=["local", "remote"])
def directory(request, bucket, tmp_path):
    """A path to try things in, twice."""
    return tmp_path if request.param == "local" else storage.path("gs://bucket/directory")


def put(directory, content):
    """Files {name: bytes} below a local directory, or one of a bucket."""
    for name, data in content.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def below(directory):
    """{name: bytes}"""
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file()
    }


def test_names(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert storage.path("~/a") == storage.absolute("a") == tmp_path / "a" and storage.path(
        "a"
    ) == pathlib.Path("a")
    remote = storage.absolute("gs://bucket/a/b.txt")
    assert (
        str(remote) == f"{remote}" == "gs://bucket/a/b.txt"
        and storage.path(remote.parent) / "b.txt" == remote
    )
    assert storage.has_parent(remote) and storage.has_parent("a") and not storage.has_parent("a/b")
    assert 0 < storage.free(tmp_path) < storage.free(remote)


def test_local_is_itself(tmp_path):
    (tmp_path / "a").touch()
    for path in (tmp_path, tmp_path / "a", tmp_path / "missing"):
        assert storage.local(path) == path


def test_a_copy_of_an_object(bucket, server, capfd):
    path = storage.path("gs://bucket/a/weights.npz")
    path.write_bytes(b"one")
    copy = storage.local(path)
    assert copy.read_bytes() == b"one" and copy.name == "weights.npz"
    assert re.fullmatch(
        rf"copied gs://bucket/a/weights.npz \(0.0 MB\) to {copy.parent}\n", capfd.readouterr().err
    )
    del server.requests[:]
    assert storage.local(path) == copy and not [r for r in server.requests if "alt=media" in r]
    path.write_bytes(b"two")  # of the same size
    assert storage.local(path).read_bytes() == b"two" and copy.read_bytes() == b"one"


def test_a_copy_of_a_directory(bucket):
    content = {f"{folder}{i}.txt": b"%d" % i * i for i in range(8) for folder in ("", "deep/er/")}
    bucket |= {f"a/b/{name}": (data, i + 1) for i, (name, data) in enumerate(content.items())}
    bucket |= {
        "a/b/": (b"", 100),
        "a/b/deep/": (b"", 101),
        "a/bc": (b"another", 102),
    }  # what Google's console makes for folders
    copy = storage.local("gs://bucket/a/b")
    assert below(copy) == content and copy.name == "b"
    bucket["a/b/3.txt"] = b"abc", 103
    assert below(storage.local("gs://bucket/a/b")) == content | {"3.txt": b"abc"}
    assert below(storage.local("gs://bucket/a/b", ["deep/*3.txt", "1.txt"])) == {
        "deep/er/3.txt": b"333",
        "1.txt": b"1",
    }


def test_what_is_not_there_is_returned(bucket):
    missing = storage.local("gs://bucket/a/b")
    assert str(missing) == "gs://bucket/a/b" and not missing.exists()


def test_what_others_write_is_seen(bucket):
    folder = storage.path("gs://bucket/a")
    bucket["a/1"] = b"", 1
    assert len(list(folder.iterdir())) == 1 and not (folder / "2").exists()
    bucket["a/2"] = b"", 1
    assert len(list(folder.iterdir())) == 2 and (folder / "2").exists()


def test_processes_copy_once(bucket, server):
    storage.path("gs://bucket/a").write_bytes(bytes(10**6))
    del server.requests[:]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(storage.local, ["gs://bucket/a"] * 4))
    assert len(set(copies)) == 1 and len([r for r in server.requests if "alt=media" in r]) == 1


def test_a_copy_that_was_cut_short_is_made_again(bucket, tmp_path, monkeypatch):
    put(storage.path("gs://bucket/a"), {"1": b"1", "2": b"2"})
    monkeypatch.setattr(pathlib.Path, "rename", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        storage.local("gs://bucket/a")
    monkeypatch.undo()
    monkeypatch.setenv("DMD_CACHE", str(tmp_path / "cache"))
    (next((tmp_path / "cache/files").glob("*.partial")) / "a/3").write_bytes(b"3")
    assert below(storage.local("gs://bucket/a")) == {"1": b"1", "2": b"2"}


def test_writing_a_file(directory):
    put(directory, {"a.npz": b"old"})
    with storage.writing(directory / "a.npz") as file:
        file.write_bytes(b"new")
        assert file.suffix == ".npz" and (directory / "a.npz").read_bytes() == b"old"
    assert (directory / "a.npz").read_bytes() == b"new" and [
        p.name for p in directory.glob("*a.npz")
    ] == ["a.npz"]
    with pytest.raises(ZeroDivisionError), storage.writing(directory / "a.npz") as file:
        file.write_bytes(b"newer")
        _ = 1 / 0
    assert (directory / "a.npz").read_bytes() == b"new" and [
        p.name for p in directory.glob("*a.npz")
    ] == ["a.npz"]


def test_writing_a_directory(directory, bucket):
    with storage.writing(directory / "model") as new:
        new.mkdir()
        put(
            new, {"index": b"1", "unet/config": b"2", "unet/weights": bytes(6 * 10**6)}
        )  # more than a single request takes
    assert (directory / "model/index").read_bytes() == b"1" and (
        directory / "model/unet/weights"
    ).read_bytes() == bytes(6 * 10**6)
    if storage.is_remote(directory):
        assert list(bucket)[-1] == "directory/model/index"
    storage.remove(directory / "model")
    storage.remove(directory / "model")
    assert not (directory / "model").exists()


def test_growing(directory):
    files = storage.Growing(directory / "stage")
    with (files.path / "a").open("a") as file:
        for i in range(3):
            file.write(f"{i}\n")
            file.flush()
            files.flush()
            assert (directory / "stage/a").read_text().split() == [str(k) for k in range(i + 1)]
    (files.path / "b").write_text("b")
    files.close()
    assert (directory / "stage/b").read_text() == "b"


def test_growing_copies_now_and_then(bucket, server, monkeypatch):
    files, now = storage.Growing("gs://bucket/stage"), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    uploads = []
    for now in np.arange(1000.0, 1040.0, 1.0):
        (files.path / "a").write_text(str(now))
        files.grown()
        uploads.append(bucket["stage/a"][1])
    assert len(set(uploads)) == 4
    files.close()
    assert bucket["stage/a"][0] == b"1039.0"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gs://strangers/a",
            "gs://strangers cannot be read "
            "(Anonymous caller does not have storage.objects.list access",
        ),
        ("gs://nowhere/a", "gs://nowhere does not exist; make that bucket first"),
        ("gs://", "gs:// has no bucket; expected gs://bucket/name"),
        ("s3://bucket/a", "s3://bucket/a is of an unknown kind"),
    ],
)
def test_a_bucket_that_cannot_be_read(server, caplog, name, message):
    for function in (storage.path, storage.local, storage.absolute):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(name)
    assert not caplog.records


def test_without_gcsfs(monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape('pip install "dmd_jax[gcs]"')):
        storage.path("gs://unseen/a")


def test_no_room(bucket, monkeypatch):
    storage.path("gs://bucket/a").write_bytes(bytes(10**6))
    monkeypatch.setattr(storage, "free", lambda path: 10**5)
    with pytest.raises(
        ValueError,
        match=r"gs://bucket/a needs 1.0 MB, but .*cache/files has 0.1 MB free; make room, "
        r"or set DMD_CACHE",
    ):
        storage.local("gs://bucket/a")


def test_no_way_out_of_the_cache(bucket):
    bucket["a/../../b"] = b"", 1
    with pytest.raises(
        ValueError, match=r"gs://bucket/a has an object '../../b', which is no name of a file"
    ):
        storage.local("gs://bucket/a")


def test_failing_uploads(bucket, server, monkeypatch):
    monkeypatch.setattr(
        gcs.Handler,
        "upload",
        lambda self: (403, {"error": {"code": 403, "message": "no storage.objects.create"}}),
    )
    refused = r"gs://bucket/a cannot be written \(Forbidden: .*no storage.objects.create"
    with (
        pytest.raises(OSError, match=refused),
        storage.writing("gs://bucket/a") as file,
    ):
        file.write_text("a")


def test_who_holds_an_object_is_alone(bucket, monkeypatch, capsys):
    monkeypatch.setattr(storage, "BEAT", 0.3)
    lock = storage.path("gs://bucket/run/lock")
    with storage.held(lock, b"process 1"):
        for _ in range(2):
            with (
                pytest.raises(ValueError, match=r"run is in use by another run, process 1; wait"),
                storage.held(lock, b"process 2"),
            ):
                pass
    assert not bucket
    bucket["run/lock"] = b"process 1, which was killed", 7
    with storage.held(lock, b"process 2"):
        assert lock.read_bytes() == b"process 2"
    assert not bucket and "waiting whether its holder lives" in capsys.readouterr().err


def test_what_a_killed_writer_has_left_is_removed(tmp_path):
    """But not what another process, or one of another host, is writing."""
    host = socket.gethostname()
    names = [f"partial-{host}-999999999-1-a.txt", f"partial-{host}-{os.getppid()}-1-a.txt"]
    names += ["partial-elsewhere-1-1-a.txt"]
    for name in names:
        (tmp_path / name).write_text("a part")
    with storage.writing(tmp_path / "a.txt") as new:
        new.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", *names[1:]}


def test_two_writers_of_one_file_both_end_right(tmp_path):
    def write(i):
        with storage.writing(tmp_path / "a.txt") as new:
            new.write_text(f"{i}" * 1000)
            time.sleep(0.01)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(20)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert len(set((tmp_path / "a.txt").read_text())) in (1, 2)


@pytest.fixture
def copied(bucket, monkeypatch):
    """Two copies of a megabyte, of which this process uses none any more."""
    for name in "ab":
        storage.path(f"gs://bucket/{name}").write_bytes(bytes(10**6))
        storage.local(f"gs://bucket/{name}")
    storage._kept_open.cache_clear()
    return bucket


def test_copies_are_listed_and_removed(copied, capsys):
    cache.run(cache.parse([]))
    lines = capsys.readouterr().out.splitlines()
    assert ["gs://bucket/a" in lines[0], "gs://bucket/b" in lines[1], len(lines)] == [True, True, 2]
    assert "1.0 MB" in lines[0]
    with pytest.raises(ValueError, match="no copy of gs://bucket/c; there are: gs://bucket/a, gs"):
        cache.run(cache.parse(["--remove=gs://bucket/c"]))
    storage.local("gs://bucket/b")
    with pytest.raises(ValueError, match="in use by a process, and kept: gs://bucket/b"):
        cache.run(cache.parse(["--remove=all"]))
    assert [copy.source for copy in storage.copies()] == ["gs://bucket/b"]


def test_copies_are_bounded(copied, monkeypatch):
    """Those that were not used for longest go, but none that a process uses."""
    monkeypatch.setenv("DMD_CACHE_GB", "0.0025")
    storage.local("gs://bucket/a")
    storage.path("gs://bucket/c").write_bytes(bytes(10**6))
    storage.local("gs://bucket/c")
    assert [copy.source for copy in storage.copies()] == ["gs://bucket/a", "gs://bucket/c"]
    monkeypatch.setenv("DMD_CACHE_GB", "0.0001")
    storage.path("gs://bucket/d").write_bytes(bytes(10**6))
    assert storage.local("gs://bucket/d").exists()
    assert len(storage.copies()) == 3
