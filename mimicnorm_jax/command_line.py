"""What every program that takes ``--config`` does with its command line."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NoReturn

from absl import app, flags, logging
from absl.testing import flagsaver
from ml_collections import ConfigDict, config_flags

from mimicnorm_jax.compilation_cache import replace_cut_entries
from mimicnorm_jax.config import FIELDS
from mimicnorm_jax.config.packaged import find_config, shown
from mimicnorm_jax.errors import (
    RunError,
    UserError,
    first_line,
    of_system,
    one_line,
    print_anything,
    unknown,
)
from mimicnorm_jax.flag_values import check_numbers, read_values
from mimicnorm_jax.guest import process_left_as_it_was
from mimicnorm_jax.parallel import coordination
from mimicnorm_jax.parallel.backend import print_warnings_of_jax
from mimicnorm_jax.parallel.coordination import Failure
from mimicnorm_jax.paths import expanded


def _define_config() -> flags.FlagHolder[ConfigDict]:
    # It reads the command line when it is defined, before anyone could say what is wrong there.
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        return config_flags.DEFINE_config_file(
            "config",
            None,
            "The configuration: a Python file, or the name of one that comes with the project.",
        )
    finally:
        sys.argv = arguments


_CONFIG = _define_config()

_SAVED_CONFIG = pathlib.Path(__file__).parent / "train" / "saved.py"


def config() -> ConfigDict:
    """The configuration, after parsing."""
    return _CONFIG.value


def config_path() -> str:
    """What the configuration comes from: a file, or the name of one of the project's."""
    return shown(str(config_flags.get_config_filename(flags.FLAGS["config"])))


def overrides() -> list[str]:
    """The arguments that set fields of the configuration, to be given to another program."""
    return [argument for argument in sys.argv[1:] if argument.lstrip("-").startswith("config.")]


def given(argv: list[str], name: str) -> str | None:
    """The value of a flag before the flags are parsed; None where it is not given."""
    value = None
    for i, argument in enumerate(argv):
        flag, equals, text = argument.partition("=")
        if argument.startswith("-") and flag.lstrip("-") == name:
            value = text if equals else argv[i + 1] if i + 1 < len(argv) else ""
    return value


#: From the command line to the folder of the run whose configuration is meant.
SavedIn = Callable[[list[str]], str | None]


def _parse(argv: list[str], saved_in: SavedIn | None) -> list[str]:
    """Parses the command line; what is wrong with it is a ``UserError``, never a traceback."""
    try:
        argv = [argv[0], *flags.FLAGS.read_flags_from_files(argv[1:])]
    except flags.Error as error:
        raise UserError(first_line(error).removeprefix("ERROR:: ")) from error
    if saved_in and given(argv, "config") is None and (run := saved_in(argv)):
        argv = [argv[0], f"--config={_SAVED_CONFIG}:{run}", *argv[1:]]
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        if name.startswith("config.") and given(argv, "config") is None:
            raise _config_is_missing(saved_in)
        if name.startswith("config.") and name.removeprefix("config.") not in FIELDS:
            raise unknown("field", f"--{name}", [f"--config.{field}" for field in FIELDS])
    (argv, unset), path = read_values(argv), None
    for i, argument in enumerate(argv):
        if argument.startswith("--config="):
            path = argument.partition("=")[2]
            argv[i] = f"--config={find_config(path)}"
        elif argument == "--config" and i + 1 < len(argv):
            path = argv[i + 1]
            argv[i + 1] = find_config(path)
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        chain: list[BaseException] = [error]
        while chain[-1].__context__:
            chain.append(chain[-1].__context__)
        # of the file that --config names; what is raised with its traceback has the same type
        ours = [each for each in chain if isinstance(each, UserError)]
        if ours:
            raise ours[-1] from None
        first = chain[-1]
        if "Error whilst parsing config file" in str(error):
            raise _config_failed(str(path), first) from error
        raise UserError(str(error).splitlines()[0]) from error
    except Exception as error:  # a config file is a program: it can fail in any way
        raise _config_failed(str(path), error) from error
    check_numbers()
    if isinstance(_CONFIG.value, ConfigDict):  # else ``validate`` says what it is
        with contextlib.suppress(KeyError):  # likewise
            _CONFIG.value.update_from_flattened_dict(dict.fromkeys(unset))
    return rest


def _config_failed(path: str, error: BaseException) -> UserError:
    """What a config file raised, and in which of its lines."""
    reason = first_line(error).partition(" Other fields present")[0]
    if isinstance(error, SyntaxError):
        where = f" (line {error.lineno})" if error.lineno else ""
        return UserError(f"--config={path} is no Python file: {error.msg}{where}")
    file, colon, argument = find_config(path).partition(":")
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(file)]
    if not lines and colon and isinstance(error, TypeError):
        return UserError(
            f"--config={path}: its get_config() takes no argument, and so not {argument!r}"
        )
    where = f" (line {lines[-1]})" if lines else ""
    return UserError(f"--config={path} failed: {type(error).__name__}: {reason}{where}")


def _config_is_missing(saved_in: SavedIn | None) -> UserError:
    instead = "; or --workdir=RUN of a run that was begun" if saved_in else ""
    if saved_in and (folder := given(sys.argv, "workdir")) and not expanded(folder).exists():
        instead = f"; and --workdir={folder} is no run: it does not exist"
    return UserError(f"--config is missing; for example --config digits_resnet20{instead}")


def _reject_arguments(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; flags are written --name=value")


Program = Callable[..., None]


def run_program(
    program: Program | Mapping[str, Program],
    *,
    without_config: Collection[str] = (),
    saved_in: SavedIn | None = None,
    takes_arguments: bool = False,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the flags and runs a program.

    A wrong input is one line and exit code 2, a run that cannot go on one line and exit code 1.
    Where one of several processes fails, the others end too.

    Args:
      program: what to run; or, where the first argument chooses, what it chooses from. One
        named ``""`` is chosen by no argument.
      without_config: those of them that take no ``--config``.
      saved_in: from the command line to the folder of the run whose configuration counts where
        no ``--config`` is given; None where none does.
      takes_arguments: call the only program with the arguments that are no flags; else there
        may be none.
      argv: the arguments, where another program calls this one, which then goes on; None: those
        of the command line, after which the process ends.

    Returns:
      The exit code.
    """
    print_anything()
    argv_is_own = argv is None  # and so is the process
    programs = program if isinstance(program, Mapping) else {"": program}

    def parse(argv: list[str]) -> list[str]:
        rest = _parse(argv, saved_in)[1:]
        chooses = isinstance(program, Mapping) and not takes_arguments
        name = rest.pop(0) if rest and chooses else ""
        if name not in programs:
            if not name:
                raise UserError(f"say which: {', '.join(programs)}")
            raise unknown("command", name, [known for known in programs if known])
        if name in without_config:
            if _CONFIG.value is not None:
                raise UserError(f"{name or 'this program'} takes no --config")
        elif _CONFIG.value is None:
            raise _config_is_missing(saved_in)
        if not takes_arguments:
            _reject_arguments(rest)
        return [argv[0], name, *rest]

    def run(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            # Orbax tells of every file it writes, and what it cannot do comes as an exception
            logging.set_verbosity(logging.FATAL)
            print_warnings_of_jax()
        if argv_is_own:
            replace_cut_entries()
        programs[argv[1]](*argv[2:])

    if argv is not None:
        return _called(lambda: run(parse([sys.argv[0], *argv])), argv)
    try:
        app.run(run, flags_parser=parse)
    except UserError as error:
        _fail(Failure(2, str(error)))
    except RunError as error:
        # at an ordinary exit Orbax's threads wait ten minutes for a save that has failed
        coordination.fail(Failure(1, str(error)))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python fails once more when it ends
        _fail(Failure(1, "what was reading the output has ended"))
    except OSError as error:  # a program that measures has no run that it could explain it by
        _fail(Failure(1, of_system(error)))
    except KeyboardInterrupt:
        _fail(Failure(130, "interrupted"))
    except Exception as error:
        if coordination.process_count() == 1:
            raise
        coordination.fail_unexpectedly(error)


def _called(program: Callable[[], None], argv: Sequence[str]) -> int:
    """Runs a program in the process of another, whose flags and arguments come back."""
    app.define_help_flags()  # once, so that they are among what is kept
    values, were_parsed = flagsaver.save_flag_values(), flags.FLAGS.is_parsed()
    _forget_flags()
    before, sys.argv = sys.argv, [sys.argv[0], *argv]  # where config_flags looks for overrides
    try:
        with process_left_as_it_was():
            program()
    except UserError as error:
        return _say(Failure(2, str(error)))
    except RunError as error:
        return _say(Failure(1, str(error)))
    except OSError as error:
        return _say(Failure(1, of_system(error)))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
        flagsaver.restore_flag_values(values)
        if were_parsed:
            flags.FLAGS.mark_as_parsed()
    return 0


def _forget_flags() -> None:
    """Sets all flags back; those of a configuration's fields exist for one command line only."""
    for name in list(flags.FLAGS):
        if name.startswith("config."):
            delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()


def _fail(failure: Failure) -> NoReturn:
    if coordination.process_count() > 1:
        coordination.fail(failure)
    sys.exit(_say(failure))


def _say(failure: Failure) -> int:
    with contextlib.suppress(OSError):  # the code tells as well, where nothing can be written
        print(f"error: {one_line(failure.message)}", file=sys.stderr, flush=True)
    return failure.code
