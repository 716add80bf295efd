"""Convert pytest's JUnit XML to JSON and add the conditions: ``python -m bench.junit FILE.xml FILE.json``."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bench.environment import conditions


def summary(xml: str) -> dict:
    """The counts of tests, failures and skips, the duration in seconds, and the message of each failure."""
    suite = next(ElementTree.fromstring(xml).iter("testsuite"))
    failed = {}
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                name = f"{case.get('classname')}::{case.get('name')}"
                failed[name] = (found.get("message") or "").splitlines()[:1]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {**counts, "seconds": float(suite.get("time", 0)), "failed": failed}


def main(argv: list[str]) -> None:
    source, target = map(Path, argv)
    document = {"conditions": conditions(), **summary(source.read_text())}
    target.write_text(json.dumps(document, indent=1) + "\n")
    source.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
