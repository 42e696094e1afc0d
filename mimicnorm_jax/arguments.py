"""The programs that take no configuration: their parser, and how they end."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from mimicnorm_jax.errors import RunError, UserError, of_system, one_line, print_anything


class Parser(argparse.ArgumentParser):
    """That of argparse; a wrong argument is a ``UserError``, without a page on how to use it.

    Args:
      prog: how the program is called.
      description: what it does, shown as it is written.
    """

    def __init__(self, prog: str, description: str):
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        """As that of argparse, which makes an empty list of ``--flag=--``."""
        found = super().parse_args(*arguments, **options)
        for action in self._actions:
            if action.nargs is None and getattr(found, action.dest, None) == []:
                self.error(f"argument {'/'.join(action.option_strings)}: expected one argument")
        return found

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def run(
    program: Callable[[], None],
    *,
    interrupted: str = "error: interrupted",
    code_of: Callable[[Exception], int] = lambda error: 1,
) -> None:
    """Runs a program; what goes wrong is one line.

    Args:
      program: what to run.
      interrupted: what is said after Ctrl-C.
      code_of: the exit code after a ``RunError`` and what the system refuses.

    Raises:
      SystemExit: with 2 after a wrong input, 130 after Ctrl-C, else as ``code_of`` says.
    """
    print_anything()
    try:
        program()
    except UserError as error:
        _end(2, f"error: {one_line(str(error))}")
    except RunError as error:
        _end(code_of(error), f"error: {one_line(str(error))}")
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python fails once more when it ends
        _end(code_of(error), "error: what was reading the output has ended")
    except OSError as error:
        _end(code_of(error), f"error: {one_line(of_system(error))}")
    except KeyboardInterrupt:
        _end(130, interrupted)


def _end(code: int, line: str) -> NoReturn:
    with contextlib.suppress(OSError):  # the code tells as well, where nothing can be written
        print(line, file=sys.stderr, flush=True)
    sys.exit(code)
