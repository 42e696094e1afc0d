"""The configs that come with the project: ``configs/``, one file an experiment."""

from __future__ import annotations

import pathlib

from mimicnorm_jax.errors import UserError, refused_by_system, unknown
from mimicnorm_jax.paths import expanded_text


def config_files() -> dict[str, pathlib.Path]:
    """The files by name, such as ``"digits_resnet20"``."""
    package = pathlib.Path(__file__).parent.parent
    installed = package / "configs"
    folder = installed if installed.is_dir() else package.parent / "configs"  # of a checkout
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def find_config(given: str) -> str:
    """The file that ``--config`` means.

    Args:
      given: a file, or the name of one that comes with the project; either may be followed by a
        colon and an argument of its ``get_config``.

    Returns:
      Its path, and what followed it.

    Raises:
      UserError: there is no such file, and no such name.
    """
    name, colon, argument = expanded_text(given).partition(":")
    with refused_by_system(f"--config={given} cannot be read"):
        is_file = pathlib.Path(name).is_file()
    if is_file:
        return f"{name}{colon}{argument}"
    files = config_files()
    if name in files:
        return f"{files[name]}{colon}{argument}"
    if pathlib.Path(name).suffix or "/" in name:
        hint = (
            f"; it comes with the project: --config={stem}"
            if (stem := pathlib.Path(name).stem) in files
            else ""
        )
        raise UserError(f"--config={given}: there is no such file{hint}")
    raise unknown("config", name, files)


def shown(path: str) -> str:
    """The name of a file that comes with the project, the path of any other."""
    names = {str(file): name for name, file in config_files().items()}
    return names.get(path, path)
