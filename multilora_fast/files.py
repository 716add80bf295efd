"""Paths that commands read and write: checked before slow work, written atomically."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

UNFINISHED = ".unfinished"  # prefix of unfinished files


def as_path(name: str, value: str | os.PathLike) -> Path:
    """The argument ``name`` as a path. Raises ValueError if it is empty, as an unset shell variable is: Path("") is the
    current directory."""
    if not os.fspath(value):
        raise ValueError(f"{name} is an empty text; give a path.")
    return Path(value)


def check_folder(name: str, folder: str | os.PathLike) -> None:
    """Raise ValueError if the argument ``name`` is no directory that can be written to or created."""
    folder = as_path(name, folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name} {folder} is a file; give a directory.")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{name} {folder} cannot be written: {existing} is a file.")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{name} {folder} cannot be written: no permission for {existing}.")


def check_new_folder(name: str, folder: str | os.PathLike, overwrite: bool) -> None:
    """:func:`check_folder`, and that the directory is empty or missing unless ``overwrite`` is true."""
    check_folder(name, folder)
    found = os.listdir(folder) if os.path.isdir(folder) else []
    if not overwrite and not all(entry.startswith(UNFINISHED) for entry in found):
        raise ValueError(f"{name} {folder} is not empty: give another directory, or overwrite=True (--overwrite).")


def check_file(name: str, path: str | os.PathLike) -> None:
    """Raise ValueError if the argument ``name`` is no file that can be written."""
    path = as_path(name, path)
    if path.is_dir():
        raise ValueError(f"{name} {path} is a directory; give a file.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{name} {path}: its directory does not exist.")


def check_plot(name: str, path: str | os.PathLike) -> None:
    """:func:`check_file`, and that the suffix is .png, .pdf or .svg."""
    path = as_path(name, path)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"{name} must end in .png, .pdf or .svg, but is {path}.")
    check_file(name, path)


def check_matplotlib(name: str) -> None:
    """Raise ValueError if matplotlib, which ``name`` needs, is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError(f"{name} needs matplotlib: run pip install matplotlib.")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``. The file moves to ``path`` on success and is removed on error."""
    unfinished = path.with_name(f"{UNFINISHED}-{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_dir(folder: Path, last: str | None = None) -> Iterator[Path]:
    """A temporary directory. On success its files move into ``folder``, which is created if missing, over files of the
    same names; on error ``folder`` is unchanged.

    Replaced files are backed up and restored if a move fails. The file named ``last`` is removed first and written
    last, so its presence means a complete write.
    """
    with made(folder):
        stage = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}-", dir=folder))
        aside = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}-", dir=folder))
        try:
            yield stage
            _replace(stage, aside, folder, last)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)


def _replace(stage: Path, aside: Path, folder: Path, last: str | None) -> None:
    paths = [path.relative_to(stage) for path in stage.rglob("*")]
    files = sorted((path for path in paths if not (stage / path).is_dir()), key=lambda path: (path.name == last, path))
    for path in files:
        if (folder / path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder / path))
    for path in sorted(path for path in paths if (stage / path).is_dir()):
        (aside / path).mkdir()
        (folder / path).mkdir(exist_ok=True)
    moves = [(folder / path, aside / path) for path in reversed(files) if os.path.lexists(folder / path)]
    moves += [(stage / path, folder / path) for path in files]
    done = []
    try:
        for source, target in moves:
            done.append((source, target))
            os.replace(source, target)
    except BaseException:
        for source, target in reversed(done):
            if not os.path.lexists(source):
                os.replace(target, source)
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what an interrupted :func:`atomic_dir` left."""
    for path in folder.glob(f"{UNFINISHED}*"):
        if path.is_dir():
            shutil.rmtree(path)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Create ``folder`` and its parents; on error remove those that are still empty."""
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):  # not empty
                path.rmdir()
        raise
