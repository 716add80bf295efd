"""What commands read and write: checked before anything slow happens, and written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".unfinished"  # how names begin of what is not yet in its place


def check_folder(name: str, folder: Path) -> None:
    """Raise ValueError if ``folder``, the value of the argument ``name``, can be no directory to write to."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name} {folder} is a file; give a directory.")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{name} {folder} cannot be written: {existing} is a file.")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{name} {folder} cannot be written: no permission for {existing}.")


def check_file(name: str, path: Path) -> None:
    """Raise ValueError if ``path``, the value of the argument ``name``, can be no file to write to."""
    if path.is_dir():
        raise ValueError(f"{name} {path} is a directory; give a file.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{name} {path}: its directory does not exist.")


def check_plot(name: str, path: Path) -> None:
    """:func:`check_file`, and that its suffix is one of a picture."""
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"{name} must end in .png, .pdf or .svg, but is {path}.")
    check_file(name, path)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to. The file moves to ``path`` if the block ends well, else it vanishes."""
    unfinished = path.with_name(f"{UNFINISHED}-{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_dir(folder: Path, last: str | None = None) -> Iterator[Path]:
    """A directory to write in. If the block ends well, its files move into ``folder``, which is made where missing, one
    by one and the one named ``last`` at the end; else nothing has changed."""
    with made(folder):
        stage = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}-", dir=folder))
        try:
            yield stage
            for path in sorted(stage.rglob("*"), key=lambda path: (path.name == last, path)):
                target = folder / path.relative_to(stage)
                if path.is_dir():
                    target.mkdir(exist_ok=True)
                else:
                    os.replace(path, target)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what an interrupted :func:`atomic_dir` left in ``folder``."""
    for path in folder.glob(f"{UNFINISHED}*/"):
        shutil.rmtree(path)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """``folder`` with its parents, made where missing; those that are empty vanish again if the block fails."""
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):  # it holds something
                path.rmdir()
        raise
