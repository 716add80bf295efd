"""Terminal output of commands: tables and a progress bar."""

from collections.abc import Collection, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
MIB = 2**20


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,), gap: str = "   "
) -> str:
    """Aligned columns under a rule, those numbered in ``left`` to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return gap.join(f"{cell:{'<' if i in left else '>'}{width}}" for i, (cell, width) in enumerate(cells))

    return "\n".join([line(header), "-" * len(line(header)), *map(line, rows)])


def progress(items: Collection[T], what: str) -> Iterator[T]:
    """``items``, with a bar on stderr after two seconds. Where stderr is no terminal, in a notebook say, there is none.

    It is gone at the end.
    """
    from tqdm import tqdm

    yield from tqdm(items, desc=what, delay=2, leave=False, disable=None)
