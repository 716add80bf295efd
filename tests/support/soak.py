"""How long the long tests take: short in ``make test``, and about ten minutes altogether in ``make soak``."""

import os

SOAK = os.environ.get("SOAK") == "1"


def amount(short: int, long: int) -> int:
    return long if SOAK else short
