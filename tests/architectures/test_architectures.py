"""Every check on every architecture (``make architectures``), or on a few that differ most."""

import os
import warnings

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from checks import CHECKS, applies
from report import Cell, write
from steps import lora

ALL = os.environ.get("ARCHITECTURES") == "all"
FEW = ("llama", "qwen3_moe", "mamba", "t5", "siglip_vision_model")
CHOSEN = [of for of in ARCHITECTURES if ALL or of.name in FEW]


@pytest.fixture(scope="module", autouse=True)
def _quietly():
    """The models are too small for more threads, and transformers has much to say about them."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def cells():
    """What each check of each architecture came to; the table is written from it when all have run."""
    found: dict[tuple[str, str], Cell] = {}
    yield found
    if ALL and len(found) == len(ARCHITECTURES) * len(CHECKS):
        write(ARCHITECTURES, list(CHECKS), found)


@pytest.mark.parametrize("of", CHOSEN, ids=lambda of: of.name)
@pytest.mark.parametrize("name", CHECKS)
def test_architecture(of, name, cells, tmp_path):
    if of.family == "diffusers":
        pytest.importorskip("diffusers", reason="needs diffusers")
    cells[of.name, name] = "fails"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not applies(of, name):
            cells[of.name, name] = "n/a"
        elif name in of.unlike:
            with pytest.raises(Exception):  # noqa: B017 - whatever it is that LoRA fails with there
                CHECKS[name](of, tmp_path, lora)
            cells[of.name, name] = "LoRA fails"
        else:
            cells[of.name, name] = CHECKS[name](of, tmp_path) or "yes"


def test_the_table_holds_what_it_promises():
    counts: dict[str, int] = {}
    for of in ARCHITECTURES:
        counts[of.family] = counts.get(of.family, 0) + 1
    least = {
        "decoder": 15, "mixture of experts": 8, "state space": 3, "encoder": 8, "encoder-decoder": 4, "vision": 3,
        "audio": 2, "vision-language": 3, "diffusers": 2,
    }  # fmt: skip
    assert all(counts[family] >= count for family, count in least.items())
    assert len({of.name for of in ARCHITECTURES}) == len(ARCHITECTURES) >= 45
    assert {of.name for of in ARCHITECTURES} >= set(FEW)
