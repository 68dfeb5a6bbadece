import json
import threading

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from dmd_jax.runtime import log


def events(directory):
    """Reads records as TensorBoard does: a length, its checksum, the event and its checksum."""
    (path,) = directory.glob("events.out.tfevents.*")
    data, found = path.read_bytes(), []
    while data:
        n = int.from_bytes(data[:8], "little")
        found.append(event_pb2.Event.FromString(data[12 : 12 + n]))
        data = data[16 + n :]
    return found


@pytest.fixture
def writer(tmp_path):
    """Of a run that goes on at step 2."""
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)) + '{"st'
    )
    return log.Writer(tmp_path, name="teacher", start=2, num_steps=4)


def test_what_is_told_is_there_at_once(writer, tmp_path):
    threads = threading.active_count()
    writer.write(3, {"loss": 0.5})
    writer.write_picture(3, np.zeros((34, 340, 3), np.uint8))
    assert log.read(tmp_path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 0.5},
    ]
    _, restart, loss, samples = events(tmp_path)
    assert restart.step == 3 and restart.session_log.status == event_pb2.SessionLog.START
    assert (loss.step, loss.summary.value[0].tag, loss.summary.value[0].simple_value) == (
        3,
        "loss",
        0.5,
    )
    assert (samples.step, samples.summary.value[0].tag, samples.summary.value[0].image.width) == (
        3,
        "samples",
        340,
    )
    assert (tmp_path / "samples/0000003.png").exists()
    assert (
        threading.active_count() == threads
    )  # a thread of its own could die of a full disk, unheard


def test_a_full_disk_is_heard(writer, monkeypatch):
    def full(record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._events._writer._py_recordio_writer, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        writer.write(3, {"loss": 0.5})


def test_a_damaged_line_is_left_out_and_said(tmp_path, caplog):
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([rows[0], "\0" * 30, '{"loss": 2}', "7", rows[1]]) + "\n")
    assert [row["step"] for row in log.read(tmp_path)] == [1, 2]
    assert f"{path}: lines [2, 3, 4] are damaged, and left out" in caplog.text
    log.Writer(tmp_path, name="teacher", start=2, num_steps=4).close()
    assert path.read_text() == "".join(f"{row}\n" for row in rows)


def test_a_start_that_is_killed_loses_no_row(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')

    def killed(self, text):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        log.Writer(tmp_path, name="teacher", start=2, num_steps=4)
    assert log.read(tmp_path) == [{"step": 1}]


def test_a_line_that_nobody_can_read_stops_nothing(writer, monkeypatch, tmp_path):
    class Closed:
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        flush = close = write

        def isatty(self):
            return False

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", Closed())
    log.say("here")
    writer.note("there")
    writer.write(3, {"loss": 0.5})
    assert log.read(tmp_path)[-1] == {"step": 3, "loss": 0.5}
