"""Processes, here threads, that wait for each other."""

import concurrent.futures
import contextlib
import socket
import time

import pytest

from mimicnorm_jax.errors import RunError, UserError
from mimicnorm_jax.parallel import roll_call as module
from mimicnorm_jax.parallel.roll_call import digests, in_words, is_own, roll_call, split_address
from tests.runs import free_port


@pytest.fixture
def call():
    """Calls the roll with the given processes; returns what each raised and what was said."""

    def start(*places, seconds=20.0, delays=()):
        address, said = f"localhost:{free_port()}", []

        def one(number):
            time.sleep(delays[number] if delays else 0.0)
            process, count = places[number]
            try:
                roll_call(address, process, count, seconds=seconds, say=said.append)
            except (RunError, UserError) as error:
                return error
            return None

        with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
            return list(pool.map(one, range(len(places)))), said

    return start


def test_all_return_when_all_are_there(call):
    began = time.monotonic()
    errors, said = call((0, 4), (1, 4), (2, 4), (3, 4), delays=(0.5, 0, 1.0, 0))
    assert errors == [None] * 4
    assert not said  # nobody waited long
    assert 1.0 <= time.monotonic() - began < 5.0


def test_each_process_says_for_whom_it_waits_and_since_when(call, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_NEWS", 0.5)
    errors, said = call((0, 3), (1, 3), (2, 3), delays=(0, 0, 2.0))
    assert errors == [None] * 3
    for process in (0, 1):
        lines = [line for line in said if line.startswith(f"process {process}/3 waits")]
        assert lines and all(" for process 2 since " in line for line in lines)
    clock = time.strftime("%H:%M")
    assert any(f"since {clock}" in line and "s)" in line for line in said)


def test_a_process_that_does_not_come_is_named_by_all(call):
    began = time.monotonic()
    errors, _ = call((0, 4), (1, 4), seconds=1.5)
    assert time.monotonic() - began < 10
    for error in errors:
        assert isinstance(error, RunError)
        assert "processes 2 and 3 of 4 did not come within 2 s" in str(error)


def test_without_process_0_the_others_give_up(call):
    (error,), _ = call((1, 2), seconds=1.0)
    assert isinstance(error, RunError)
    assert "process 0 did not come to localhost:" in str(error)
    assert "was it started, and can this machine reach it?" in str(error)


def test_two_processes_with_one_index_are_an_error(call):
    errors, _ = call((0, 3), (1, 3), (1, 3), (2, 3), delays=(0, 0, 1.0, 2.0))
    assert errors[:2] == [None, None] and errors[3] is None
    assert isinstance(errors[2], UserError)
    assert "there is a process 1 already" in str(errors[2])


def test_processes_that_were_told_different_numbers_are_an_error(call):
    errors, _ = call((0, 2), (1, 3), seconds=2.0)
    assert isinstance(errors[1], UserError)
    assert "process 1 was told of 3 processes, process 0 of 2" in str(errors[1])
    assert isinstance(errors[0], RunError)


NOISE = [
    *(b"GET / HTTP/1.1\r\n\r\n", b'{"process": "x"}', b"[]", b"", b"\n", bytes(range(256))),
    *(b"null\n", b"[]\n", b'"process"\n', b"1\n", b"{}\n", b"[" * 60_000 + b"\n", b"x" * 200_000),
    b'{"process": 1e999, "count": 2, "alike": {}}\n',
    b'{"process": true, "count": 2, "alike": {}}\n',
    b'{"process": 1, "count": 2, "alike": []}\n',
    b'{"process": 1, "count": 2, "alike": {"--workdir": {}}}\n',
    b'{"process": -1, "count": 2, "alike": {}}\n',
    b'{"process": 1}\n',
]


def test_strangers_at_the_port_do_no_harm(call, monkeypatch):
    address = f"localhost:{free_port()}"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        alike = digests({"--workdir": "run"})
        first = pool.submit(roll_call, address, 0, 2, seconds=20.0, say=print, alike=alike)
        for noise in NOISE:
            deadline = time.monotonic() + 10
            while True:
                try:
                    stranger = socket.create_connection(split_address(address))
                    break
                except OSError:
                    assert time.monotonic() < deadline
            with stranger, contextlib.suppress(OSError):  # it is shut out before it has ended
                stranger.sendall(noise)
                stranger.settimeout(0.3)
                stranger.recv(100)
        idle = [socket.create_connection(split_address(address)) for _ in range(80)]
        pool.submit(roll_call, address, 1, 2, seconds=20.0, say=print, alike=alike).result(20)
        first.result(20)
        for connection in idle:
            connection.close()


def test_a_port_in_use_is_one_line():
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"localhost:{port}.*in use"):
            roll_call(f"localhost:{port}", 0, 2, seconds=5.0, say=print)


@pytest.mark.parametrize("address", ["localhost", "host:", ":80", "host:0", "host:70000", "a:b"])
def test_a_wrong_address_is_one_line(address):
    with pytest.raises(UserError, match="is not HOST:PORT"):
        split_address(address)


def test_an_ipv6_address_is_understood():
    assert split_address("[::1]:8476") == ("::1", 8476)


def test_many_missing_processes_are_summed_up():
    assert in_words([3]) == "process 3"
    assert in_words([5, 1, 2]) == "processes 1, 2 and 5"
    assert in_words(range(64)) == "processes 0, 1, 2, 3, 4, 5, 6, 7 and 56 others"


def test_a_process_of_another_run_is_refused_and_the_run_waits_for_its_own():
    address, said = f"localhost:{free_port()}", []
    ours, theirs = digests({"--workdir": "ours"}), digests({"--workdir": "theirs"})
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(roll_call, address, 0, 2, seconds=20.0, say=said.append, alike=ours)
        with pytest.raises(UserError, match="processes 0 and 1 differ in --workdir"):
            roll_call(address, 1, 2, seconds=20.0, say=print, alike=theirs)
        roll_call(address, 1, 2, seconds=20.0, say=print, alike=ours)
        first.result(20)
    assert said == ["process 0/2 refuses one at its port: processes 0 and 1 differ in --workdir"]


def test_a_report_may_come_in_parts():
    address = f"localhost:{free_port()}"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(roll_call, address, 0, 2, seconds=20.0, say=print)
        time.sleep(0.3)
        with socket.create_connection(split_address(address)) as connection:
            for part in (b'{"process": 1, ', b'"count": 2, "alike"', b": {}}", b"\n"):
                connection.sendall(part)
                time.sleep(0.1)
            first.result(20)


def test_it_is_held_on_the_address_that_was_given():
    """Not on all of the machine's, of which some may lead to strangers."""
    assert is_own("127.0.0.1") and is_own("localhost") and not is_own("192.0.2.1")
    with module._server("127.0.0.1", 0) as server:
        assert server.getsockname()[0] == "127.0.0.1"


def test_a_name_that_leads_back_here_is_no_place_to_listen_on_alone(monkeypatch):
    """Many machines take their own name for 127.0.1.1; the others of a run do not."""

    def found(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(module.socket, "getaddrinfo", found)
    assert not is_own("machine-7") and is_own("localhost") and is_own("127.0.0.1")
    with module._server("machine-7", 0) as server:
        assert server.getsockname()[0] in ("::", "0.0.0.0")


def test_a_stranger_that_is_dismissed_while_it_speaks_does_no_harm():
    server = socket.create_server(("localhost", 0))
    address = server.getsockname()
    with module._Callers(server, {"count": 2, "alike": {}}, print) as callers:
        idle = []
        for _ in range(module._MOST_STRANGERS):
            idle.append(socket.create_connection(address))
            callers.listen()
        last = socket.create_connection(address)  # for which the first has to go
        idle[0].sendall(b"x")
        time.sleep(0.2)
        callers.listen()
        callers.listen()
        assert len(callers._said) == module._MOST_STRANGERS
    for connection in [*idle, last]:
        connection.close()


def test_the_reason_of_a_refusal_is_in_the_last_word(call):
    errors, _ = call((0, 2), (1, 3), seconds=1.5)
    assert "did not come within 2 s (refused: process 1 was told of 3 processes" in str(errors[0])
