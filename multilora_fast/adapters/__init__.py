"""Adapter files."""

from multilora_fast.adapters.files import load_adapter, save_adapter

__all__ = ["load_adapter", "save_adapter"]
