"""Bars fit a terminal of 80 columns, and nothing is shown where nobody looks."""

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios

import pytest

from mimicnorm_jax.progress_bar import is_notebook, progress_bar
from mimicnorm_jax.train.progress import Progress

ROW = {
    "step": 35100,
    "epoch": 89.9,
    "train_loss": 0.3676,
    "train_loss_floor": 0.3222,
    "train_accuracy": 0.998,
    "learning_rate": 4.01e-6,
    "images_per_second": 1722.0,
}

_END = "<all was read>"


@pytest.fixture
def terminal():
    """A terminal of 80 columns, and what was written to it."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(slave, "w") as stderr:

        def written():
            # The kernel hands a terminal's text over when it has time, on a busy machine in
            # parts: read until the mark comes.
            print(_END, file=stderr, end="", flush=True)
            text = ""
            while not text.endswith(_END):
                text += os.read(master, 100_000).decode()
            return text.removesuffix(_END)

        yield stderr, written
    os.close(master)


def test_the_bar_of_a_run_fits_a_terminal_of_80_columns(terminal, monkeypatch):
    stderr, written = terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    progress = Progress(0, 35160)
    progress.advance(35100)
    progress.show(ROW)
    progress.close()
    drawn = [part for part in re.split(r"[\r\n]+", written()) if part.strip()]
    assert all(len(part) <= 80 for part in drawn)
    assert "100%|" in drawn[-1] and "35100/35160" in drawn[-1] and " left, epoch 89.9" in drawn[-1]
    assert "loss 0.368 (at least 0.322)" in drawn[-1]


def test_elsewhere_a_run_writes_lines_that_can_be_read(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = Progress(0, 270)
    progress.show(ROW | {"step": 270, "epoch": 12.0})
    line = capsys.readouterr().out.rstrip()
    assert re.fullmatch(
        r"270/270 epoch 12\.0 loss 0\.368 \(at least 0\.322\) acc 99\.8% 1722 img/s, 00:00 left",
        line,
    )
    assert len(line) <= 80
    assert sys.stderr.getvalue() == ""
    assert not is_notebook()


def test_nothing_is_drawn_where_nobody_looks(terminal, monkeypatch):
    stderr, written = terminal
    for file, shown in ((stderr, False), (io.StringIO(), True), (stderr, True)):
        monkeypatch.setattr(sys, "stderr", file)
        assert list(progress_bar(range(3), "counting", shown=shown)) == [0, 1, 2]
        if file is not stderr:
            assert file.getvalue() == ""
    assert written().count("counting: 100%") == 1  # the last one
