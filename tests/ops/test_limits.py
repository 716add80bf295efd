"""Values at the edge: draws that equal the threshold of dropout, and inputs too small for the scale of 8 bits."""

import numpy as np
import torch

from multilora_fast.ops.saved_input import restore, save_input
from multilora_fast.ops.torch_backend import dropout_mask


def test_a_draw_that_equals_the_threshold_is_kept():
    draws = np.random.SFC64(7).random_raw(5).view(np.int16)[:16].astype(int) + 32768
    mask = dropout_mask(torch.tensor([7]), 1, 16, int(draws[0]) / 65536)[0]
    assert mask.tolist() == (draws >= draws[0]).tolist()
    assert mask[0]


def test_inputs_of_float16_below_its_normal_numbers_stay_finite():
    x = torch.tensor([[6e-8, 3e-7, 0.0], [1e-6, -2e-6, 5e-7]], dtype=torch.float16)
    saved = save_input(x, "fp8")
    assert saved.scale.min() >= torch.finfo(torch.float16).smallest_normal
    again = restore(*saved, torch.float16)
    assert torch.isfinite(again).all()
    assert (again - x).abs().max() <= 0.07 * x.abs().max()
