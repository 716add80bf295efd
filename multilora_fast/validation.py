"""Argument validation. Errors are one sentence: the argument, the value, what is expected."""

import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any


def check_hyperparameters(*, r: int, lora_num: int, lora_dropout: float, scaling: str = "vector") -> None:
    for name, value in (("r", r), ("lora_num", lora_num)):
        check_integer(name, value, least=1)
    check_dropout("lora_dropout", lora_dropout)
    if scaling not in ("vector", "scalar"):
        raise ValueError(f'scaling must be "vector" or "scalar", not {scaling!r}.')


def check_dropout(name: str, p: float) -> None:
    if not isinstance(p, (int, float)) or not 0.0 <= p < 1.0:
        raise ValueError(f"{name} must be a probability in [0, 1), not {p!r}.")


def check_alpha(alpha: float | None) -> None:
    if alpha is not None and not _is_finite_number(alpha):
        raise ValueError(f"lora_alpha must be a number or None, not {alpha!r}.")


def check_scaling_factor(factor: float) -> None:
    if not _is_finite_number(factor):
        raise ValueError(f"scaling_factor must be a finite number, not {factor!r}.")


def _is_finite_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def check_integer(name: str, value: int, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}.")


def check_config(config: Mapping) -> None:
    """r, lora_num and lora_alpha in an adapter's config, of which a LoRA's has no lora_num, and their patterns."""
    for name, field in (("r", "rank_pattern"), ("lora_num", "lora_num_pattern"), ("lora_alpha", "alpha_pattern")):
        pattern = config.get(field) or {}
        if not isinstance(pattern, Mapping):
            raise ValueError(f"{field} must be an object, not {pattern!r}.")
        for key in pattern:
            check_expression(field, key)
        for value in (config.get(name, 1), *pattern.values()):
            if name == "lora_alpha":
                check_alpha(value)
            else:
                check_hyperparameters(**{"r": 1, "lora_num": 1, name: value}, lora_dropout=0.0)


def check_expression(field: str, expression: str) -> None:
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{field} holds {expression!r}, which is no regular expression: {error}.") from None


def check_save_inputs(choice: str) -> None:
    if choice not in ("exact", "fp8"):
        raise ValueError(f'save_inputs must be "exact" or "fp8", not {choice!r}.')


def check_switch(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}.")


def check_names(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, (list, tuple, set)) and all(isinstance(v, str) for v in value)):
        raise ValueError(f"{name} must be a list of names or None, not {value!r}.")


def check_text(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} must be a text or None, not {value!r}.")
