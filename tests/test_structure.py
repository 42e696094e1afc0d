"""How the package hangs together: imports without a circle, public names, programs."""

import ast
import importlib
import importlib.util
import json
import pkgutil
import re

import pytest
from absl import flags

import mimicnorm_jax

from .conftest import ROOT

PACKAGE = ROOT / "mimicnorm_jax"
PROGRAMS = json.loads((ROOT / "tests" / "program_flags.json").read_text())


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path, known):
    """Modules of the package that a file imports anywhere, functions and types included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            # ``from package import module`` needs the module; any other name, the package
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found & known


def circle_in(graph):
    """A path that ends where it began, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        found = next(filter(None, map(visit, sorted(graph[node]))), None)
        path.pop()
        done.add(node)
        return found

    return next(filter(None, map(visit, sorted(graph))), None)


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a", "c"}}) is None
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_module_imports_itself_round_a_corner():
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    graph = {name: imported(path, set(files)) for name, path in files.items()}
    assert len(graph) > 100 and sum(map(len, graph.values())) > 300
    circle = circle_in(graph)
    assert circle is None, " -> ".join(circle)


def test_public_names_stay_public_objects_when_all_submodules_are_imported():
    packages = [mimicnorm_jax]
    for info in pkgutil.walk_packages(mimicnorm_jax.__path__, "mimicnorm_jax."):
        if not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            packages += [module] if info.ispkg else []
    public = [package for package in packages if hasattr(package, "__all__")]
    assert len(public) >= 5
    for package in public:
        assert len(set(package.__all__)) == len(package.__all__)
        for name in package.__all__:
            # a submodule of the same name would have taken its place
            assert not isinstance(getattr(package, name), type(importlib)), (package, name)


def program_module(program):
    spec = importlib.util.find_spec(program)
    return f"{program}.__main__" if spec.submodule_search_locations else program


def shown_by_help(program, capsys):
    """The flags in the page that ``--help`` prints, and its first line."""
    module = importlib.import_module(program_module(program))
    if not hasattr(module, "argparse"):
        keys = flags.FLAGS.get_key_flags_for_module(module.__name__)
        return {flag.name for flag in keys}, module.__doc__
    with pytest.raises(SystemExit):
        module.main(["--help"])
    page = capsys.readouterr().out
    return set(re.findall(r"^  (?:-\w, )?--([\w-]+)", page, re.MULTILINE)) - {"help"}, page


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_keep_their_flags(program, capsys):
    names, page = shown_by_help(program, capsys)
    assert names == set(PROGRAMS[program])
    assert len(page.splitlines()[0]) > 10


def test_help_is_what_python_m_prints(run_main):
    done = run_main("--help", module="mimicnorm_jax.tools.benchmark")
    shown = re.findall(r"^  --(?:\[no\])?([\w-]+)", done.stdout, re.MULTILINE)
    assert set(shown) == set(PROGRAMS["mimicnorm_jax.tools.benchmark"]), done.stderr
    assert done.stdout.startswith("How fast a configuration trains")


def test_every_program_is_among_them():
    mains = {
        module_name(path).removesuffix(".__main__")
        for path in PACKAGE.rglob("*.py")
        if '\nif __name__ == "__main__":\n' in path.read_text()
    }
    assert mains - {"mimicnorm_jax.config"} == set(PROGRAMS)


def test_configurations_are_copied_with_their_groups():
    """``ConfigDict(config)`` would share them, so that a change of the copy changes both."""
    shared = [
        f"{module_name(path)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ConfigDict" and node.args
    ]
    assert not shared
