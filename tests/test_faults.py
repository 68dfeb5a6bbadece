"""Whatever happens between two writes, the same command ends with the unbroken run's result.

DMD_TEST_FAULTS is how many moments are tried of each kind; 0 for all. A moment is before a file is
written, when it is written and not yet in its place, or when it is there; or before or after a
checkpoint is begun.
"""

import contextlib
import errno
import itertools
import os
import random

import chex
import pytest

from dmd_jax import main
from dmd_jax.data import records
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import checkpoint, storage
from tests.helpers import runs

pytestmark = pytest.mark.usefixtures("recipes_once")
FAULTS = int(os.environ.get("DMD_TEST_FAULTS", "1"))
SEED = int.from_bytes(os.urandom(4), "little")


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


WRITES = ((storage, "writing"), (storage, "_to_disk"), (storage, "_sync"), (checkpoint, "save"))
READS = ((storage, "read_json"), (records.Records, "__getitem__"), (checkpoint, "_meta"))


def moments(monkeypatch, functions, act):
    """Calls `act` with the number of every moment, before and after each call of the functions."""
    count = itertools.count()

    def around(function):
        def call(*args, **kwargs):
            act(next(count))
            result = function(*args, **kwargs)
            act(next(count))
            return result

        return call

    for where, name in functions:
        monkeypatch.setattr(where, name, around(getattr(where, name)))
    return count


def result(workdir):
    """All that has to be equal."""
    source = records.read(directory=workdir / "pairs")
    params = [runs.params_of(runs.smoke(), workdir, stage) for stage in ("teacher", "dmd")]
    return params, [source[i] for i in range(len(source))], runs.scores_of(runs.result_of(workdir))


@pytest.fixture(scope="module")
def number_of_moments(finished, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("counted") / "run"
    runs.put_classifier(finished, workdir)
    with pytest.MonkeyPatch.context() as patch:
        counts = {kind: moments(patch, kind, lambda number: None) for kind in (WRITES, READS)}
        main.run(runs.smoke(), workdir)
        return {kind: next(count) for kind, count in counts.items()}


def chosen(number):
    moments = list(range(number))
    return random.Random(SEED).sample(moments, FAULTS) if FAULTS else moments


@pytest.mark.timeout(3600)
def test_killed_between_any_two_writes(finished, number_of_moments, tmp_path, monkeypatch):
    for moment in chosen(number_of_moments[WRITES]):
        workdir = tmp_path / f"{moment}"
        runs.put_classifier(finished, workdir)

        def kill(number, moment=moment):
            if number == moment:
                raise Killed

        with monkeypatch.context() as patch:
            moments(patch, WRITES, kill)
            with pytest.raises(Killed):
                main.run(runs.smoke(), workdir)
        main.run(runs.smoke(), workdir)
        chex.assert_trees_all_equal(result(workdir), result(finished))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("functions", "number"),
    [(WRITES, errno.ENOSPC), (READS, errno.EIO)],
    ids=["the disk is full", "reading fails"],
)
def test_one_fault(finished, number_of_moments, tmp_path, monkeypatch, functions, number):
    """After it the same command ends with the same result."""
    for moment in chosen(number_of_moments[functions]):
        workdir = tmp_path / f"{moment}"
        runs.put_classifier(finished, workdir)

        def fail(count, moment=moment):
            if count == moment:
                raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            moments(patch, functions, fail)
            with contextlib.suppress(OSError, ValueError):  # what can be made again may be left
                main.run(runs.smoke(), workdir)
        main.run(runs.smoke(), workdir)
        chex.assert_trees_all_equal(result(workdir), result(finished))


@pytest.mark.parametrize("damage", ["flip", "zero", "truncate", "remove"])
def test_a_damaged_shard_is_noticed(workdir, damage):
    path = sorted((workdir / "pairs").glob("*.arrayrecord"))[1]
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
    path.write_bytes({"zero": bytes(len(data)), "truncate": data[:99]}.get(damage, data))
    if damage == "remove":
        path.unlink()
    with pytest.raises((ValueError, RuntimeError), match=r"shard|record|checksum|hash"):
        source = records.read(directory=workdir / "pairs")
        [source[i] for i in range(len(source))]


def test_two_starters_at_once(finished, tmp_path):
    """The second one is refused, and the first is not disturbed."""
    runs.put_classifier(finished, tmp_path / "run")
    config = runs.smoke()
    claimed = workdir_lib.claimed(runs.values_of(config), tmp_path / "run")
    with claimed, pytest.raises(ValueError, match="is in use by another run"):
        main.run(config, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "classifier.npz",
        "config.json",
        "lock",
    ]
