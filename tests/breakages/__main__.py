"""Breaks the package on purpose, one place at a time, and makes sure that a test fails each time.

python -m tests.breakages
python -m tests.breakages dropout-scale lock-token
python -m tests.breakages --tree ../another-checkout

It works on a copy of what git tracks in a tree, as it is in the working folder. The ``*.toml`` here
have the breakages: a name, the text that is replaced, what replaces it, and the tests of which one
has to fail. A breakage names no file: it belongs to the one file of the package that holds its old
text, once. So the same breakages serve trees in which modules stand elsewhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
MOST_SECONDS = 1200  # of one call of pytest


class Breakage(NamedTuple):
    """A mistake, and the tests of which one has to fail because of it."""

    name: str
    old: str
    new: str
    tests: list[str]


class Finished(NamedTuple):
    """A call of pytest; exit code 1 means that tests failed."""

    code: int
    seconds: float
    output: str


def read_breakages() -> dict[str, Breakage]:
    found: dict[str, Breakage] = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("*.toml")):
        for name, fields in tomllib.loads(path.read_text()).items():
            assert name not in found, f"{path}: {name} is there twice"
            found[name] = Breakage(name, **fields)
    return found


def copy_tracked(tree: pathlib.Path, copy: pathlib.Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=tree, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (tree / name).is_file():  # else it is deleted in the working folder
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, copy / name)


def find_file(copy: pathlib.Path, old: str) -> pathlib.Path | str:
    """The file that holds a text exactly once, or what is wrong."""
    counts = {path: path.read_text().count(old) for path in (copy / "mimicnorm_jax").rglob("*.py")}
    found = [path for path, count in counts.items() if count]
    if sum(counts.values()) == 1:
        return found[0]
    places = ", ".join(str(path.relative_to(copy)) for path in sorted(found))
    return f"its old text is there {sum(counts.values())} times instead of once ({places or '-'})"


def write(path: pathlib.Path, text: str) -> None:
    """Also removes the compiled file, which Python would take for that of a text as long."""
    path.write_text(text)
    pathlib.Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def run_tests(copy: pathlib.Path, tests: list[str]) -> Finished:
    began = time.monotonic()
    # programs are compiled once for all calls, not once a call
    cache = {"JAX_COMPILATION_CACHE_DIR": str(copy.parent / "compiled")}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)} | cache,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=MOST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Finished(-1, time.monotonic() - began, f"no end after {MOST_SECONDS} s")
    return Finished(done.returncode, time.monotonic() - began, done.stdout)


def outcome(copy: pathlib.Path, path: pathlib.Path, breakage: Breakage) -> tuple[bool, str]:
    """Whether the tests catch a breakage, and what to say of it."""
    text = path.read_text()
    write(path, text.replace(breakage.old, breakage.new))
    try:
        done = run_tests(copy, breakage.tests)
    finally:
        write(path, text)
    if done.code == 1:
        return True, f"caught in {done.seconds:.1f} s"
    if done.code == 0:
        return False, "NOT CAUGHT"
    return False, f"ERROR, exit code {done.code} of pytest:\n{done.output[-2000:]}"


def try_all(tree: pathlib.Path, chosen: list[Breakage], copy: pathlib.Path) -> int:
    """Tries breakages in a copy of a tree; returns the exit code."""
    copy_tracked(tree, copy)
    places = [find_file(copy, breakage.old) for breakage in chosen]
    if wrong := [(b.name, p) for b, p in zip(chosen, places, strict=True) if isinstance(p, str)]:
        print("\n".join(f"{name}: {what}" for name, what in wrong))
        return 1
    tests = list(dict.fromkeys(test for breakage in chosen for test in breakage.tests))
    unbroken = run_tests(copy, tests)
    if unbroken.code:
        print(f"the tests fail without any breakage:\n{unbroken.output[-6000:]}")
        return 1
    print(f"{len(tests)} tests pass unbroken in {unbroken.seconds:.1f} s", flush=True)
    count = 0
    for breakage, path in zip(chosen, places, strict=True):
        caught, what = outcome(copy, path, breakage)
        count += caught
        print(f"{breakage.name} ({path.relative_to(copy)}): {what}", flush=True)
    print(f"{count} of {len(chosen)} caught")
    return 0 if count == len(chosen) else 1


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns the exit code: 0 if every breakage was caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.breakages", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of breakages; default: all")
    parser.add_argument("--tree", type=pathlib.Path, default=ROOT, help="default: this checkout")
    options = parser.parse_args(arguments)
    known = read_breakages()
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    chosen = [known[name] for name in options.names or known]
    with tempfile.TemporaryDirectory(prefix="breakages-") as folder:
        return try_all(options.tree, chosen, pathlib.Path(folder).resolve() / "tree")


if __name__ == "__main__":
    sys.exit(main())
