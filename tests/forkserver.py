"""Starts Python programs as processes that have imported the package already.

A test that starts ``python -m mimicnorm_jax.main`` spends two seconds of the processor on imports
before anything of interest happens. ``start`` asks a server, one of each test process, to fork: its
children are processes like any other (own signals, threads, exit code, ordinary end of the
interpreter), only warm. The server imports no program, defines no program's flags, and starts no
backend, so a child reads ``XLA_FLAGS`` itself.

What JAX and Python read from the environment when they are imported must be the server's; programs
with another environment are started in the ordinary way. ``test_forkserver.py`` holds both to each
other.
"""

import atexit
import gc
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings

ROOT = pathlib.Path(__file__).parent.parent
# What almost every program imports; none of them is a program or defines a program's flags.
PRELOADED = (
    *("mimicnorm_jax.command_line", "mimicnorm_jax.train.loop", "mimicnorm_jax.train.evaluation"),
    *("mimicnorm_jax.train.setup", "mimicnorm_jax.theory", "sklearn.datasets", "PIL.Image"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
)
READ_AT_IMPORT = ("JAX_", "PYTHON", "OPENBLAS", "OMP_", "TF_", "LD_", "MPL")
READ_LATER = ("PYTHONPATH", "PYTHONUNBUFFERED")  # by _become


def _serve(control: socket.socket, modules: list[str]) -> dict:
    """Forks at each request and tells of each end; returns in the child, with its request."""
    for name in modules:
        __import__(name)
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    interrupt = signal.getsignal(signal.SIGINT)  # ignored where a shell started the tests with &
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the children
    wake, wakes = socket.socketpair()
    wake.setblocking(False)
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno())
    requests = control.makefile("r")
    while True:
        ready, _, _ = select.select([requests, wake], [], [])
        if wake in ready:
            wake.recv(4096)
        while (ended := _ended()) is not None:
            control.sendall((json.dumps({"ended": ended}) + "\n").encode())
        if requests in ready:
            line = requests.readline()
            if not line:
                os._exit(0)
            with warnings.catch_warnings():  # JAX warns of threads, of which it has none yet
                warnings.simplefilter("ignore")
                pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGINT, interrupt)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for end in (wake, wakes, control, requests):
                    end.close()
                return json.loads(line)
            control.sendall((json.dumps({"pid": pid}) + "\n").encode())


def _ended() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def _become(request: dict) -> None:
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    os.chdir(request["cwd"])
    for number, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY)
        os.dup2(opened, number)
        os.close(opened)
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdout.reconfigure(line_buffering=False, write_through=unbuffered)
    sys.path[:1] = [request["cwd"], *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    sys.argv = [request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


class Forked:
    """What the tests need of ``subprocess.Popen``."""

    def __init__(self, server: "_Server", pid: int):
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.exit_code(self.pid, 0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._server.exit_code(self.pid, timeout)
            if self.returncode is None:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Server:
    def __init__(self, modules: tuple[str, ...]):
        self._control, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forkserver", str(theirs.fileno()), *modules],
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.environment = dict(os.environ)
        self._unread = b""
        self._codes: dict[int, int] = {}
        atexit.register(self.close)

    def start(self, request: dict) -> Forked:
        self._control.sendall((json.dumps(request) + "\n").encode())
        while True:
            answer = self._answer(None)
            if "pid" in answer:
                return Forked(self, answer["pid"])

    def exit_code(self, pid: int, timeout: float | None) -> int | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while pid not in self._codes:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._answer(left) is None:
                return None
        return self._codes.pop(pid)

    def _answer(self, timeout: float | None) -> dict | None:
        while b"\n" not in self._unread:
            if not select.select([self._control], [], [], timeout)[0]:
                return None
            received = self._control.recv(4096)
            if not received:
                raise RuntimeError("the fork server has ended")
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if "ended" in answer:
            pid, code = answer["ended"]
            self._codes[pid] = code
        return answer

    def close(self) -> None:
        self._control.close()
        self._process.wait()


_SERVERS: dict[tuple, _Server] = {}


def at_import(environment) -> dict:
    """The part of an environment that must be the server's."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_AT_IMPORT) and name not in READ_LATER
    }


def start(module, arguments, *, env, cwd, out, err, modules=PRELOADED):
    """Starts ``python -m module`` with its output in two files; a ``Popen``, or much like one.

    ``modules``: what its server has imported.
    """
    key = (os.getpid(), modules)
    if key not in _SERVERS:
        _SERVERS[key] = _Server(modules)
    server = _SERVERS[key]
    for path in (out, err):
        pathlib.Path(path).write_text("")
    if at_import(env) == at_import(server.environment):
        request = {"module": module, "arguments": list(arguments), "env": dict(env)}
        return server.start(request | {"cwd": str(cwd), "out": str(out), "err": str(err)})
    with open(out, "w") as out_file, open(err, "w") as err_file:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, cwd=cwd, env=env, stdout=out_file, stderr=err_file)


def run(module, arguments, *, env, cwd=ROOT, timeout=300, modules=PRELOADED):
    """Runs ``python -m module`` to its end: like ``subprocess.run``, with text captured."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = pathlib.Path(folder, "out"), pathlib.Path(folder, "err")
        arguments = list(map(str, arguments))
        process = start(module, arguments, env=env, cwd=cwd, out=out, err=err, modules=modules)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(
            [module, *arguments], process.returncode, out.read_text(), err.read_text()
        )


if __name__ == "__main__":
    _become(_serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:]))
