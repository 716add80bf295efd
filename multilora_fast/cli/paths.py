"""Parameters of the command line that several commands share."""

import re
from pathlib import Path

import typer

OVERWRITE = typer.Option(
    "--overwrite", help="Allow an output directory that is not empty. Replaces files of the same names."
)


def given_path(value: str) -> Path:
    """``value`` as a path. Refuses an empty text, which an unset shell variable becomes: Path("") is the current
    directory."""
    if not value:
        raise typer.BadParameter("an empty text; give a path.")
    return Path(value)


def modules(text: str | None) -> list[str] | str | None:
    """A list of names, or the text itself if it is "all-linear" or a regular expression."""
    if text is None or text.lower() == "all-linear" or not re.fullmatch(r"[\w.,\s-]*", text):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
