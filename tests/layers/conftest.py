import pytest
import torch

from multilora_fast.layers import shared_input
from multilora_fast.ops import functional


@pytest.fixture
def one_seed(monkeypatch):
    """Every mask from one seed, so that layers alone and in a group drop the same."""
    monkeypatch.setattr(functional, "_seed_tensor", lambda seed, device: torch.tensor([77], device=device))


@pytest.fixture
def served(monkeypatch):
    """How many layers each call of a group served."""
    found, apply = [], shared_input.apply_group
    monkeypatch.setattr(shared_input, "apply_group", lambda *args: found.append((len(args) - 4) // 5) or apply(*args))
    return found
