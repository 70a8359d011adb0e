"""metrics.jsonl and TensorBoard events, as other programs read them."""

import json
import struct
import sys

import pytest

from lowprec.errors import UsageError
from lowprec.training.metrics import JsonLines, TensorBoard, Writers, cut_after, read_lines


def write(path, steps, last_step=0):
    writer = JsonLines(path, last_step)
    for step in steps:
        writer.write({"step": step, "loss": 1 / step})
    writer.flush()
    writer.close()


def test_each_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path, 0)
    for step in (1, 2):
        writer.write({"step": step, "nested": {"layer": {"sqnr_db": 20.0}}})
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, step + 1))
    writer.close()


def test_numbers_survive_exactly(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [3, 7])
    assert [line["loss"] for line in read_lines(path)] == [1 / 3, 1 / 7]


def test_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path, 0)
    writer.write({"step": 1, "loss": float("nan"), "of": {"layer": float("inf")}})
    writer.close()
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"step": 1, "loss": None, "of": {"layer": None}}


@pytest.mark.parametrize(("last", "kept"), [(0, []), (2, [1, 2]), (3, [1, 2]), (4, [1, 2, 4]), (9, [1, 2, 4])])
def test_a_resumed_run_cuts_off_what_comes_again(tmp_path, last, kept):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 4])
    write(path, [], last_step=last)
    assert [line["step"] for line in read_lines(path)] == kept


@pytest.mark.parametrize("tail", [b'{"step": 3, "loss', b'{"step": 3}', b"\x00\x00\x00\n", b"[3]\n", b'{"loss": 3}\n'])
def test_half_a_line_is_no_line_and_is_cut_off(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    cut_after(path, 100)
    assert path.read_bytes() == whole


def test_no_file_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "none.jsonl") == []


def events(directory):
    """(step, tag, value) of all scalars in TensorBoard's files: records of length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            content = content[12 + length + 4 :]
    return found


def test_tensorboard_gets_the_same_scalars(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = Writers(JsonLines(tmp_path / "metrics.jsonl", 0), TensorBoard(tmp_path / "events", 0))
    writer.write({"step": 3, "loss": 1.5, "name": "text", "quantization": {"layers/0": {"fwd.x": {"sqnr_db": 20.0}}}})
    writer.flush()
    writer.close()
    assert events(tmp_path / "events") == [(3, "loss", 1.5), (3, "quantization/layers/0/fwd.x/sqnr_db", 20.0)]
    assert read_lines(tmp_path / "metrics.jsonl")[0]["loss"] == 1.5


def test_a_missing_tensorboardx_is_said_clearly(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UsageError, match=r"needs tensorboardX: pip install 'lowprec\[tensorboard\]'"):
        TensorBoard(tmp_path, 0)
