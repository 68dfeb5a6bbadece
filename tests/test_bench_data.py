"""What the data alone can supply, at toy size."""

import re

import numpy as np
import pytest

from dmd_jax.bench import __main__ as bench
from dmd_jax.bench import data
from dmd_jax.data import captions, records


def run(*argv):
    arguments = bench.parse(list(argv))
    arguments.run(arguments)


def test_records(capsys, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 5)
    run("records", "--count=16", "--batch_size=8", "--repeats=2", "--need=2000")
    devices, rows, need = capsys.readouterr().out.splitlines()
    assert devices.startswith("device: ") and devices.endswith(" cores")
    size = 2 * 64 * 64 * 4 * 4 + 77 * 768 * 2  # bytes
    rates = re.fullmatch(
        rf"batches of records: ([\d.]+) \(.*\) rows a second, (\d+) MB/s; {size / 1e3:.0f} kB each",
        rows,
    )
    assert float(rates[2]) == pytest.approx(float(rates[1]) * size / 1e6, abs=0.6)
    ratio = re.search(r"need 2000 rows a second.*gives ([\d.]+) times", need)
    assert float(ratio[1]) == pytest.approx(float(rates[1]) / 2000, abs=0.006)


def test_captions(capsys):
    run("captions", "--count=3", "--repeats=1", "--size=32")
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["one after another", "in threads"]


def test_what_is_read_is_what_train_and_embed_read(tmp_path):
    data.write_records(tmp_path / "pairs", 7)
    source = records.read(directory=tmp_path / "pairs")
    assert len(source) == 7
    assert {name: (a.shape, str(a.dtype)) for name, a in source[3].items()} == data.PAIR
    rows, bad = captions.readable(
        captions.coco(**data.write_captions(tmp_path, 4), size=0), range(4)
    )
    assert not bad
    assert {row["image"].shape for row in rows.values()} == {(480, 640, 3), (640, 480, 3)}
    size = np.mean([path.stat().st_size for path in (tmp_path / "images").iterdir()])
    assert 120e3 < size < 200e3  # COCO's train2017: 160 kB


@pytest.mark.parametrize(
    "arguments", ["records --count=0", "records --repeats=0", "captions --size=0"]
)
def test_nothing_to_time(monkeypatch, arguments):
    monkeypatch.setattr("sys.argv", ["bench", *arguments.split()])
    with pytest.raises(SystemExit, match=r"^error: \w+ is 0; expected at least 1\.$"):
        bench.main()
