"""All processes of a run see the folder that process 0 has locked."""

import json

import pytest

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.parallel import coordination
from mimicnorm_jax.train import lock
from mimicnorm_jax.train.lock import LOCK_NAME, WorkdirLock


@pytest.fixture
def as_process_1(monkeypatch):
    """This process is told by process 0 that its token is ``t0ken``."""
    monkeypatch.setattr(coordination, "is_first", lambda: False)
    monkeypatch.setattr(coordination, "exchange", lambda what, value: ["t0ken", value])
    monkeypatch.setattr(coordination, "together", lambda what, do: do())
    monkeypatch.setattr(lock, "_SECONDS_UNTIL_SEEN", 1.0)


def test_the_folder_of_process_0_is_recognized(as_process_1, tmp_path):
    (tmp_path / LOCK_NAME).write_text(json.dumps({"token": "t0ken"}))
    WorkdirLock(tmp_path).close()
    assert (tmp_path / LOCK_NAME).read_text() == json.dumps({"token": "t0ken"})


@pytest.mark.parametrize("content", [None, "", json.dumps({"token": "of an earlier run"})])
def test_another_folder_is_an_error(content, as_process_1, tmp_path):
    if content is not None:
        (tmp_path / LOCK_NAME).write_text(content)
    with pytest.raises(UserError, match="is not the folder of process 0: it must be on a file sys"):
        WorkdirLock(tmp_path)
