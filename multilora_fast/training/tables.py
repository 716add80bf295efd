"""Rows from Parquet files and from data sets on the Hugging Face hub, read by ``datasets``."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HUB = re.compile(r"hf:/+([^/:]+/[^/:]+)(?:/([^:]+))?(?::(.+))?$")  # Path collapses the two slashes


def is_table(path: Path | str) -> bool:
    return str(path).startswith("hf:/") or Path(path).suffix == ".parquet"


def table_rows(path: Path | str) -> Iterator[tuple[str, object]]:
    """The rows of FILE.parquet or hf://OWNER/NAME[/CONFIG][:SPLIT] (default split: train), each with its place. Removes
    the nulls with which a table fills missing keys.

    Raises:
        ValueError: ``datasets`` is missing or cannot read it.
    """
    hub = HUB.match(str(path))
    if hub is None and str(path).startswith("hf:/"):
        raise ValueError(f"{path} must be hf://OWNER/NAME, hf://OWNER/NAME/CONFIG or either with :SPLIT.")
    if hub is None and not Path(path).is_file():
        raise ValueError(f"{path} cannot be read: No such file or directory.")
    if find_spec("datasets") is None:
        raise ValueError(f"{path} needs datasets: run pip install datasets")
    import datasets

    name, config, split = hub.groups() if hub else ("parquet", None, None)
    files = {} if hub else {"data_files": str(path)}
    try:
        table = datasets.load_dataset(name, config, split=split or "train", streaming=True, **files)
        for number, row in enumerate(table, 1):
            yield f"{path}, row {number}", _without_nulls(row)
    except Exception as error:  # each reader has its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None or k == "content"}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
