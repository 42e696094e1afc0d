"""TensorBoard's files: after a SIGKILL they lack nothing that the metrics have."""

import json

from tensorboardX.proto.event_pb2 import Event

from mimicnorm_jax.train.metrics import MetricsWriter


def events(workdir):
    (path,) = (workdir / "tensorboard").iterdir()
    content, at, found = path.read_bytes(), 0, []
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        found.append(Event.FromString(content[at + 12 : at + 12 + length]))
        at += 16 + length
    return [event for event in found if event.HasField("summary")]


def seen(workdir):
    return [
        (e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in events(workdir)
    ]


def write(workdir, step, steps):
    writer = MetricsWriter(workdir, step)
    for number in steps:
        writer.write({"step": number, "train_loss": 0.5 * number, "missing": None})
    return writer


def test_what_was_not_flushed_is_written_again(tmp_path):
    writer = write(tmp_path, 0, range(1, 6))  # and killed: nothing was flushed
    writer._file.close()
    again = write(tmp_path, 4, [5, 6])
    again.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seen(tmp_path) == [(row["step"], "train_loss", row["train_loss"]) for row in rows]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    writer._events.close()


def test_times_stay_and_a_cut_off_file_is_read_as_far_as_it_goes(tmp_path):
    write(tmp_path, 0, range(1, 6)).close()
    before = {event.step: event.wall_time for event in events(tmp_path)}
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-30])
    write(tmp_path, 5, []).close()
    after = {event.step: event.wall_time for event in events(tmp_path)}
    assert list(after) == [1, 2, 3, 4, 5]
    assert [after[step] for step in range(1, 5)] == [before[step] for step in range(1, 5)]
    assert after[5] >= before[5]


def test_files_that_are_none_are_replaced(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    for number, content in enumerate((b"", b"\xff" * 100, bytes(30))):
        (tmp_path / "tensorboard" / f"events.out.tfevents.{number}").write_bytes(content)
    write(tmp_path, 0, [1]).close()
    assert seen(tmp_path) == [(1, "train_loss", 0.5)]
