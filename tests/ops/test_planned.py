"""Calls replayed from a launch plan, on a GPU simulated in Triton's interpreter: the same bits as without a plan, few
Python calls and launches, in the right order."""

import ast
import re
import sys
from functools import partial

import pytest
import torch
from interpreted import interpreted_gpu
from torch import nn

from bench.simulated import Compiled, simulated_gpu
from multilora_fast import FusedMultiLoRALinear, dropout_mask, multilora_add, multilora_linear
from multilora_fast.kernels import configs, plan
from multilora_fast.testing import NAMES, random_case, run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU needs no simulated one")


def results(case, **options) -> dict[str, torch.Tensor]:
    def op(x, weight, lora_A, lora_B, lora_scaling, bias=None):
        rest = {"scaling_factor": case.scaling_factor, "backend": "triton", **options}
        return multilora_linear(x, weight, bias, lora_A, lora_B, lora_scaling, **rest)

    return run(op, case)


def replayed(step) -> list[str]:
    """Check that a second step only replays, with the bits of one without plans; return the kernels it ran."""
    wanted = step()
    with interpreted_gpu() as ran:
        step()
        ran.clear()
        found = step()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(replay for _, replay in ran)
    return [name for name, _ in ran]


OPTIONS = [{}, {"dropout_p": 0.4, "seed": 5}, {"exact_base": True}]
KINDS = [{}, {"bias": False, "scaling": "scalar"}, {"adapter_dtype": torch.float64}, {"dtype": torch.float64}]


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (90, 40)], ids=str)
@pytest.mark.parametrize("i", range(4))
def test_a_replayed_call_gives_the_bits_of_the_launchers(i, shape):
    kind, options = KINDS[i], OPTIONS[(i + len(shape) + shape[0]) % 3]
    cases = [random_case(shape, 16, 3, 4, seed=seed, **{"dtype": torch.float32, **kind}) for seed in range(2)]
    wanted = [results(case, **options) for case in cases]
    with interpreted_gpu() as ran:
        for case, expected in zip(cases, wanted, strict=True):
            ran.clear()
            for name, value in results(case, **options).items():
                assert torch.equal(value, expected[name]), name
    assert ran
    assert all(replayed for _, replayed in ran)


def test_the_source_of_a_plan_holds_numbers_and_its_own_names(monkeypatch):
    made = []

    class Kept(plan.Plan):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(plan, "Plan", Kept)
    with interpreted_gpu():
        results(random_case((90, 40), 16, 3, 4, dtype=torch.float32), dropout_p=0.4, seed=5)
    assert len(made) == 2
    for one in made:
        nodes = list(ast.walk(ast.parse(one.source)))
        assert {node.attr for node in nodes if isinstance(node, ast.Attribute)} <= {
            "data_ptr", "new_empty", "addmm_", "t", "as_strided",
        }  # fmt: skip
        assert all(isinstance(node.value, int | float | None) for node in nodes if isinstance(node, ast.Constant))
        names = {node.id for node in nodes if isinstance(node, ast.Name)} - set(one.names)
        assert all(re.fullmatch(r"(p_)?[in]\d+|p_t|temporary|stream", name) for name in names), names


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_branches_added_to_an_output_are_replayed_too(p):
    case = random_case((6, 24), 16, 3, 4, bias=False)
    y = torch.randn(6, 16)

    def op(x, weight, lora_A, lora_B, lora_scaling, bias=None):
        rest = {"dropout_p": p, "seed": 3, "backend": "triton"}
        return multilora_add(y.requires_grad_(), x, lora_A, lora_B, lora_scaling, **rest)

    replayed(lambda: run(op, case, ["x", "lora_A", "lora_B", "lora_scaling"]))


def test_the_joint_kernel_is_replayed_too(monkeypatch):
    monkeypatch.setattr(configs, "product_config", lambda direction, *rest: configs.PRODUCT_TILES["interpreter"])
    monkeypatch.setattr("multilora_fast.kernels.linear.product_config", configs.product_config)
    case = random_case((40, 32), 48, 2, 8, dtype=torch.float32)
    assert replayed(lambda: results(case, dropout_p=0.4, seed=5)).count("product_kernel") == 2


def test_a_call_of_another_kind_is_another_plan():
    case = random_case((6, 24), 16, 3, 4)
    with interpreted_gpu() as ran:
        for scale in (1.0, 2.0):
            for x in (case.x, case.x[:5], torch.cat([case.x, case.x], 1)[:, :24]):
                ran.clear()
                parameters = [case.parameters[name] for name in NAMES]
                found = multilora_linear(x, *parameters, scaling_factor=scale)
                assert not any(replayed for _, replayed in ran)
                assert torch.equal(found, multilora_linear(x, *parameters, scaling_factor=scale))


WRONG = [("dropout_p", 1.5), ("dropout_p", [0.1]), ("scaling_factor", float("nan")), ("save_inputs", "int4")]
WRONG += [("exact_base", 1.5)]


def test_mistakes_are_named_where_a_call_of_their_shapes_was_planned():
    case = random_case((6, 24), 16, 3, 4)
    parameters = [case.parameters[name] for name in NAMES]
    with interpreted_gpu():
        for _ in range(2):
            multilora_linear(case.x, *parameters)
        for name, value in WRONG:
            for _ in range(2):
                with pytest.raises(ValueError, match=name):
                    multilora_linear(case.x, *parameters, **{name: value})


def test_saved_tensors_that_come_back_laid_out_in_another_way():
    case = random_case((6, 24), 16, 3, 4, bias=False)
    parameters = {name: case.parameters[name].requires_grad_() for name in NAMES if name in case.parameters}
    x = case.x.requires_grad_()

    def gradients(**hooks):
        with torch.autograd.graph.saved_tensors_hooks(**hooks):
            out = multilora_linear(x, parameters["weight"], None, *list(parameters.values())[-3:], backend="triton")
        return torch.autograd.grad(out, [x, *parameters.values()], case.dy)

    keep = {"pack_hook": lambda t: t, "unpack_hook": lambda t: t}
    turned = {"pack_hook": lambda t: t, "unpack_hook": lambda t: t.t().contiguous().t() if t.dim() == 2 else t}
    wanted = gradients(**keep)
    with interpreted_gpu():
        for hooks in (keep, keep, turned, turned):
            assert all(map(torch.equal, gradients(**hooks), wanted))


class Events:
    """Counts the ``call`` and ``c_call`` events of sys.setprofile in the block, without the simulation's own."""

    def __enter__(self):
        self.count = 0
        sys.setprofile(self.see)
        return self

    def see(self, frame, event, argument):
        own = frame.f_code.co_filename.endswith("simulated.py")
        self.count += event in ("call", "c_call") and not own

    def __exit__(self, *_):
        sys.setprofile(None)


STUB = partial(lambda *_: None)


def stub():
    return simulated_gpu(lambda *_: Compiled(STUB))


def events(step) -> int:
    for _ in range(3):
        step()
    with Events() as seen:
        step()
    return seen.count


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_a_warm_step_of_a_layer_makes_few_python_calls(p):
    layer = FusedMultiLoRALinear(nn.Linear(64, 64, bias=False).requires_grad_(False), r=32, lora_num=3, lora_dropout=p)
    x, dy = torch.randn(8, 64, requires_grad=True), torch.randn(8, 64)
    with stub():
        count = events(lambda: layer(x).backward(dy))
    print(f"{count} events, dropout {p}")
    assert count <= 250


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_the_ops_that_torch_compile_calls_make_no_more_python_calls(p):
    """Compiled code calls both ops, which autograd does not see."""
    case = random_case((8, 64), 64, 3, 32, bias=False)
    v = {name: case.parameters[name].requires_grad_(name != "weight") for name in NAMES if name != "bias"}
    branches = [v["lora_A"], v["lora_B"], v["lora_scaling"]]
    x, seed = case.x.requires_grad_(), torch.tensor([3]) if p else None
    settings, needs = (1.0, p, torch.float32, "triton"), [True, False, False, True, True, True]
    ops_of = torch.ops.multilora_fast
    forward, backward = ops_of.multilora_forward.default, ops_of.multilora_backward.default

    def eager():
        multilora_linear(x, v["weight"], None, *branches, dropout_p=p, seed=seed, backend="triton").backward(case.dy)

    @torch.no_grad()
    def ops():
        _, H = forward(x, None, v["weight"], None, *branches, seed, *settings)
        backward(case.dy, x, H, v["weight"], *branches, seed, *settings, needs)

    with stub():
        counts = events(eager), events(ops)
    print(f"{counts[0]} events of the Function, {counts[1]} of the ops")
    assert counts[1] <= counts[0]


def launched(M: int, p: float, monkeypatch, joint: bool = False) -> list[str]:
    """What a forward and backward of a 4096 → 4096 layer, n·r = 96, launches in bfloat16 on an H100, base products and
    second passes included; nothing is computed."""
    steps = []
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda out, a, b: steps.append("addmm_") or out)
    if not joint:
        monkeypatch.setattr("multilora_fast.kernels.linear.product_config", lambda *_: None)
    else:
        tile = configs.PRODUCT_TILES["sm_90"]
        monkeypatch.setattr("multilora_fast.kernels.linear.product_config", lambda *_: tile)

    def compile_and_run(kernel, blocks, arguments):
        name = kernel.fn.__name__
        steps.append(name)
        return Compiled(lambda *_: steps.append(name))

    base = nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer = FusedMultiLoRALinear(base, r=32, lora_num=3, lora_dropout=p)
    x, dy = (torch.zeros(M, 4096, dtype=torch.bfloat16) for _ in range(2))
    with simulated_gpu(compile_and_run):
        for _ in range(2):
            steps.clear()
            layer(x.requires_grad_()).backward(dy)
    return steps


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize(
    ("M", "joint", "most"),
    [(8192, False, 9), (2048, False, 9), (512, False, 11), (16, False, 11), (8192, True, 7), (2048, True, 7)],
)
def test_a_layer_takes_few_launches_and_two_less_with_the_joint_kernel(M, joint, most, p, monkeypatch):
    steps = launched(M, p, monkeypatch, joint)
    print(len(steps), steps)
    assert len(steps) <= most + 2 * (p > 0)


@pytest.mark.parametrize("joint", [False, True])
def test_the_big_product_of_backward_comes_before_both_reduces(joint, monkeypatch):
    steps = launched(2048, 0.05, monkeypatch, joint)
    product = "product_kernel" if joint else "addmm_"
    last = max(i for i, name in enumerate(steps) if name == product)
    assert last < min(i for i, name in enumerate(steps) if name == "reduce_kernel")
    assert steps.count("finish_kernel") == 1


def test_the_mask_of_the_op_is_dropout_mask(monkeypatch):
    case = random_case((6, 40), 16, 3, 4, bias=False)
    eye = {"lora_A": torch.eye(40)[None], "lora_B": torch.eye(40)[None], "lora_scaling": torch.ones(1, 40)}
    seed = torch.tensor([11])
    with interpreted_gpu():
        found = [multilora_add(torch.zeros(6, 40), case.x, **eye, dropout_p=0.5, seed=seed) for _ in range(2)]
        keep = dropout_mask(seed, 6, 40, 0.5, backend="triton")
    assert all(torch.equal(out != 0, keep) for out in found)
    assert plan.why_not() == "TRITON_INTERPRET is set"
