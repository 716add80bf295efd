"""Terminal output of commands: tables, a progress bar, and silence of other libraries."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
MIB = 2**20


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,), gap: str = "   "
) -> str:
    """Rows of aligned columns under a header and a rule. Columns whose index is in ``left`` are flush left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return gap.join(f"{cell:{'<' if i in left else '>'}{width}}" for i, (cell, width) in enumerate(cells))

    return "\n".join([line(header), "-" * len(line(header)), *map(line, rows)])


def progress(items: Collection[T], what: str) -> Iterator[T]:
    """Iterate over ``items`` with a progress bar on stderr, shown after two seconds and erased at the end. Without a
    terminal there is no bar."""
    from tqdm import tqdm

    yield from tqdm(items, desc=what, delay=2, leave=False, disable=None)


def quiet() -> None:
    """Silence FutureWarnings, and transformers and its progress bars."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
