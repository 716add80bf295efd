import gc
import os

import pytest
import torch
from device import DEVICE

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the first kernel module is imported

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks once, before its first product


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return DEVICE


def pytest_collection_finish():
    gc.freeze()  # full collections skip what the imports made


def pytest_sessionfinish():
    gc.unfreeze()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
