import pytest


@pytest.fixture
def only(monkeypatch):
    """Plans count these methods only, in a fraction of the time."""
    return lambda *methods: monkeypatch.setattr("multilora_fast.memory.plan.METHODS", methods)
