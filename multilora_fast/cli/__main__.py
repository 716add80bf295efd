"""``python -m multilora_fast.cli``."""

from multilora_fast.cli import main

main()
