"""The memory of a training step: measured, and planned before it is run."""

from multilora_fast.memory.measure import peak_bytes, saved_bytes

__all__ = ["peak_bytes", "saved_bytes"]
