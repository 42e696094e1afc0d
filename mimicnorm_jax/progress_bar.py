"""Bars that show how far something is: on a terminal, and in a notebook; nowhere else."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from tqdm import tqdm

#: What is called with every item of every bar, shown or not: such as what looks for hanging runs.
listeners: list[Callable[[], None]] = []

_COLUMNS = 79  # of a notebook's output
_SECONDS = 0.5  # between two updates of a notebook, each of which is a message to a browser


def is_notebook() -> bool:
    """Whether this is the kernel of a notebook, such as Jupyter's or Colab's."""
    shell: Any = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class _NotebookBar(tqdm):
    """A bar in an output of its own, which is replaced at every update."""

    def __init__(self, *args: Any, **options: Any):
        self._shown: Any = None
        options |= {"file": io.StringIO(), "ncols": _COLUMNS, "ascii": False}
        super().__init__(*args, mininterval=_SECONDS, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        from IPython.display import display

        content = {"text/plain": str(self) if msg is None else msg}
        if self._shown is None:
            self._shown = display(content, raw=True, display_id=True)
        else:
            self._shown.update(content, raw=True)

    def clear(self, nolock: bool = False) -> None:
        """Other lines have outputs of their own, so nothing makes way for them."""

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        print(s, file=file, end=end, flush=True)


def progress_bar(
    items: Iterable[Any] | None = None,
    description: str | None = None,
    total: int | None = None,
    *,
    shown: bool = True,
    **options: Any,
) -> Any:
    """A bar, with the methods of tqdm's; it shows nothing where nobody looks.

    Args:
      items: to iterate over; without them ``update`` counts.
      description: before the bar.
      total: how many there are.
      shown: False to show nothing, as in a process that does not speak for its run.
      options: of ``tqdm``.
    """
    if items is not None:
        total = len(items) if total is None and isinstance(items, Sized) else total
        items = _heard(items)
    if is_notebook():
        return _NotebookBar(items, description, total, disable=not shown, **options)
    options = {"dynamic_ncols": True} | options
    return tqdm(items, description, total, disable=not (shown and sys.stderr.isatty()), **options)


def _heard(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        goes_on()
        yield item


def goes_on() -> None:
    """Tells that what takes long goes on, where there is no bar."""
    for listener in listeners:
        listener()
