"""Paths on the command line."""

from pathlib import Path

import typer


def given_path(value: str) -> Path:
    """``value`` as a path. An empty text, which a shell passes for a variable that is not set, is refused: of it Path
    makes the current directory."""
    if not value:
        raise typer.BadParameter("an empty text; give a path.")
    return Path(value)
