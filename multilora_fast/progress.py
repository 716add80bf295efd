"""A progress bar for loops that may take a while."""

from collections.abc import Collection, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Collection[T], what: str) -> Iterator[T]:
    """``items``, with a bar on stderr after two seconds. Where stderr is no terminal, in a notebook say, there is none.

    It is gone at the end.
    """
    from tqdm import tqdm

    yield from tqdm(items, desc=what, delay=2, leave=False, disable=None)
