"""Makes MULTILORA a method that PEFT knows."""

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

NAME = "MULTILORA"


def peft_type() -> PeftType:
    """PeftType.MULTILORA. It is added as a true member, which PEFT's registry and transformers ask for."""
    if NAME not in PeftType.__members__:
        member: Any = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        member.__objclass__, member._sort_order_ = PeftType, len(PeftType)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType[NAME]


def register(config_cls: type, model_cls: Any) -> None:
    """Register the method, once.

    Raises:
        ImportError: PEFT has another method of this name.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type())
    if known is config_cls:
        return
    if known is not None:
        raise ImportError(f"PEFT already has a method called {NAME}, {known.__module__}.{known.__qualname__}.")
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
