"""What a replay of a group's halves gives the kernels, on a CPU that plays a GPU: all that they would have been given,
and of temporaries the same distances."""

import pytest
import torch
from torch import nn

from bench.simulated import Compiled, simulated_gpu
from multilora_fast import MultiLoRALinear, fuse
from multilora_fast.kernels import launch
from multilora_fast.ops import equations
from multilora_fast.ops.call import Call, signature


class Projections(nn.Module):
    def __init__(self, ranks, p):
        super().__init__()
        for name, N, r in zip(("q_proj", "k_proj", "v_proj"), (64, 48, 32), ranks, strict=True):
            base = nn.Linear(64, N, bias=name == "q_proj").requires_grad_(False)
            self.add_module(name, MultiLoRALinear(base, r=r, lora_num=2, lora_dropout=p))


def addresses(arguments) -> list:
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("ranks", [(8, 8, 8), (8, 4, 16)])
def test_a_replay_gives_the_kernels_the_same(ranks, p, monkeypatch):
    ran: list = []
    model = Projections(ranks, p)
    fuse(model, backend="triton")
    halves = {}
    run = Call.run

    def noted(call, function, inputs, *options, new=None):
        halves[function.__name__] = call, function, inputs, options
        return run(call, function, inputs, *options, new=new)

    monkeypatch.setattr(Call, "run", noted)
    runtime = lambda kernel: frozenset(name for name in kernel.arg_names if name.islower())  # noqa: E731
    monkeypatch.setattr(launch, "_runtime_names", runtime)
    with simulated_gpu(lambda *_: Compiled(lambda *arguments: ran.append(arguments[9:]))):
        x = torch.randn(40, 64, requires_grad=True)
        outs = [layer(x) for layer in model.children()]
        torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])
        assert set(halves) == {"group_forward", "group_backward"}
        with torch.no_grad():
            for call, function, inputs, options in halves.values():
                forward = function is equations.group_forward
                found = call.plans[function if forward else (function, options, signature(inputs[:3]))]
                ran.clear()
                function(*inputs, call.settings, *options)
                direct, kept = [addresses(arguments) for arguments in ran], list(ran)
                ran.clear()
                found.replay(*inputs)
                replayed = [addresses(arguments) for arguments in ran]
                given = {t.data_ptr() for t in inputs if t is not None}
                moved: dict[int, set[int]] = {}
                assert len(direct) == len(replayed)
                for tensors, ours, theirs in zip(kept, replayed, direct, strict=True):
                    assert len(ours) == len(theirs)
                    for t, a, b in zip(tensors, ours, theirs, strict=True):
                        if not isinstance(t, torch.Tensor) or b in given:
                            assert a == b
                        else:
                            moved.setdefault(t.untyped_storage().data_ptr(), set()).add(a - b)
                assert all(len(distances) == 1 for distances in moved.values())
