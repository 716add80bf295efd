"""Random cases of the op against the reference loop in float64 by the 2× rule, and of layers that share their input
against the same layers alone.

With HYPOTHESIS_PROFILE=nightly (``make fuzz``) 1,000 cases of the op per backend, and a tenth of groups.
"""

import copy
import math
import os
from types import SimpleNamespace
from unittest import mock

import torch
from device import DEVICE
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from multilora_fast import MultiLoRALinear, dropout_mask, fuse, multilora_add, multilora_linear
from multilora_fast.ops import functional
from multilora_fast.ops.saved_input import restore, save_input
from multilora_fast.ops.torch_backend import inverse_keep
from multilora_fast.testing import Case, random_case, run, truth, two_times_rule

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def fuzz(ci: int, nightly: int):
    return settings(
        max_examples=nightly if NIGHTLY else ci, derandomize=not NIGHTLY, deadline=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


HALVES = [(torch.float16, torch.float16), (torch.float16, torch.float32)]
BFLOAT = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
WIDE = [(torch.float32, torch.float32), (torch.float64, torch.float64)]
LAYOUTS = ["contiguous", "transposed", "every other", "padded", "offset"]
LORA = ("lora_A", "lora_B", "lora_scaling")


def reads_padding() -> bool:
    """Whether torch's own bfloat16 product reads beyond its rows, as oneDNN's does on some processors."""
    rows = F.pad(torch.ones(17, 11, dtype=torch.bfloat16), (0, 5), value=torch.nan)[:, :11]
    return bool((rows @ torch.ones(11, 24, dtype=torch.bfloat16)).isnan().any())


READS_PADDING = reads_padding()


def laid(t: Tensor, layout: str) -> Tensor:
    """The same values at other strides, among NaN where torch bears it; "expanded" repeats the first along an axis."""
    among = 1000.0 if READS_PADDING and t.dtype == torch.bfloat16 else torch.nan
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "every other":
        return torch.stack([t, torch.full_like(t, among)], -1)[..., 0]
    if layout == "padded":
        return F.pad(t, (3, 2), value=among)[..., 3:-2]
    if layout == "offset":
        return torch.cat([t.new_full((1,), among), t.flatten()])[1:].view(t.shape)
    if layout == "expanded rows":
        return t[:1].expand(t.shape)
    if layout == "expanded columns":
        return t[..., :1].expand(t.shape)
    return t


def in_8_bits(x: Tensor) -> Tensor:
    """x rounded so that "fp8" keeps it exactly; twice, because a token's largest value may round up to the next power
    of two."""
    for _ in range(2):
        x = restore(*save_input(x, "fp8"), x.dtype).view(x.shape)
    return x


class Drawn(SimpleNamespace):
    """A case of the op and how to call it."""

    def case(self, backend: str) -> Case:
        dtype, adapter_dtype = self.dtypes
        case = random_case(
            self.shape, self.N, self.n, self.r, dtype=dtype, adapter_dtype=adapter_dtype, bias=self.bias,
            scaling=self.scaling, scaling_factor=self.scaling_factor, seed=self.values, device=DEVICE,
        )  # fmt: skip
        if self.save_inputs == "fp8":
            case.x = in_8_bits(case.x)
        case.x, case.dy = (laid(t, self.layouts[name]) for name, t in (("x", case.x), ("dy", case.dy)))
        case.parameters = {name: laid(t, self.layouts.get(name, "")) for name, t in case.parameters.items()}
        if self.p:
            M, K = self.shape[:-1], self.shape[-1]
            mask = dropout_mask(self._seed(), torch.Size(M).numel(), K, self.p, backend=backend)
            case.factor = mask.double() * inverse_keep(self.p)
        return case

    def op(self, backend: str):
        """As ``op(x, **parameters)`` of multilora_fast.testing."""
        options = {"scaling_factor": self.scaling_factor, "dropout_p": self.p, "backend": backend}
        options["save_inputs"] = self.save_inputs
        if self.seed != "drawn":
            options["seed"] = self._seed() if self.seed == "tensor" else int(self._seed())

        def op(x, weight, lora_A, lora_B, lora_scaling, bias=None):
            branches = (lora_A, lora_B, lora_scaling)
            if self.call == "add":
                return multilora_add(F.linear(x, weight, bias), x, *branches, **options)
            return multilora_linear(
                x, (lambda: weight) if self.call == "function" else weight, bias, *branches, **options
            )

        def called(x, **parameters):
            torch.manual_seed(self.values)
            if self.checkpointing is None:
                return op(x, **parameters)
            return checkpoint(
                lambda x, *values: op(x, **dict(zip(parameters, values, strict=True))), x, *parameters.values(),
                use_reentrant=self.checkpointing,
            )  # fmt: skip

        return called

    def _seed(self) -> Tensor:
        """What the op draws itself after manual_seed(values)."""
        torch.manual_seed(self.values)
        return torch.randint((1 << 63) - 1, (1,), device=DEVICE)


def sizes(most: tuple[int, ...]):
    return st.tuples(*(st.integers(0, size) for size in most))


@st.composite
def drawn(draw, backend: str) -> Drawn:
    leading = draw(st.sampled_from([(), (70,), (4, 17), (2, 3, 7)]).flatmap(sizes))
    width = st.integers(1, 70) | st.sampled_from([8, 64, 128, 129])
    half_in_the_interpreter = backend == "triton" and DEVICE == "cpu"  # where bfloat16 is wrong
    known = HALVES + (WIDE[:1] if backend == "triton" and DEVICE == "cuda" else WIDE)
    dtypes = draw(st.sampled_from(known + ([] if half_in_the_interpreter else BFLOAT)))
    call = draw(st.sampled_from(["linear", "linear", "add", "function"]))
    bias = draw(st.booleans())
    names = ["x", *LORA] + ["weight"] * (call != "function") + ["bias"] * bias
    layouts = {name: draw(st.sampled_from(LAYOUTS)) for name in ("weight", "bias", *LORA)}
    layouts |= {name: draw(st.sampled_from([*LAYOUTS, "expanded rows", "expanded columns"])) for name in ("x", "dy")}
    halves = [torch.float16] if half_in_the_interpreter else [torch.float16, torch.bfloat16]
    casts = {torch.float32: halves, torch.float64: []}.get(dtypes[0], [dtypes[0]])  # torch refuses to mix two halves
    return Drawn(
        shape=(*leading, draw(width)),  # of x
        N=draw(width),
        n=draw(st.integers(1, 5)),
        r=draw(st.integers(1, 9) | st.sampled_from([12, 16, 32, 60])),
        dtypes=dtypes,  # of x and the base, and of the branches
        bias=bias,
        scaling=draw(st.sampled_from(["vector", "scalar"])),
        scaling_factor=draw(st.sampled_from([1.0, 0.25, 2.0, 1 / 3, -1.5])),
        p=draw(st.sampled_from([0.0, 0.0, 0.05, 0.5, 0.9])),
        seed=draw(st.sampled_from(["int", "tensor", "drawn"])),
        autocast=draw(st.sampled_from([None, None, *casts])),
        call=call,
        save_inputs=draw(st.sampled_from(["exact", "exact", "fp8"])),
        checkpointing=draw(st.sampled_from([None, None, False, True])),  # use_reentrant, or None for none
        wanted=frozenset(draw(st.sets(st.sampled_from(names), min_size=1))),
        layouts=layouts,
        values=draw(st.integers(0, 2**32)),
    )


def check(one: Drawn, backend: str) -> None:
    if one.dtypes[0] == torch.float64:  # where the truth is no more exact than the op
        case = one.case(backend)
        exact = truth(case)
        for name, ours in run(one.op(backend), case, one.wanted).items():
            torch.testing.assert_close(
                ours, exact[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
            )
        return
    if not broken([one], backend):
        return
    event("judged by 16 draws")
    several = [Drawn(**vars(one) | {"values": one.values + i}) for i in range(1, 17)]
    assert not broken(several, backend)


def broken(several: list[Drawn], backend: str) -> dict[str, str]:
    """What breaks the 2x rule by its norms over all cases, since a single number may round unluckily."""
    found = [
        two_times_rule(one.op(backend), one.case(backend), autocast=one.autocast, wanted=one.wanted) for one in several
    ]
    norms = {
        name: [math.hypot(*side) for side in zip(*(rule[name] for rule in found), strict=True)] for name in found[0]
    }
    return {name: f"{error:.3e} > {bound:.3e}" for name, (error, bound) in norms.items() if not error <= bound}


@fuzz(100, 1000)
@given(one=drawn("torch"))
def test_the_op_on_torch(one):
    check(one, "torch")


@fuzz(30, 1000)
@given(one=drawn("triton"))
def test_the_op_on_triton(one):
    check(one, "triton")


NAMES = ("q_proj", "k_proj", "v_proj")


@st.composite
def drawn_group(draw, backend: str) -> nn.ModuleDict:
    """Two or three layers of one K, dropout and dtype, and half of the time one rank, with non-zero branches."""
    K, p = draw(st.integers(1, 70)), draw(st.sampled_from([0.0, 0.3]))
    dtype = draw(st.sampled_from([torch.float32] + [torch.float64] * (backend == "torch")))
    rank = draw(st.none() | st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    layers = nn.ModuleDict()
    for name in NAMES[: draw(st.integers(2, 3))]:
        base = nn.Linear(K, draw(st.integers(1, 70)), bias=draw(st.booleans()), device=DEVICE, dtype=dtype)
        layer = MultiLoRALinear(
            base, r=rank or draw(st.integers(1, 9)), lora_num=draw(st.integers(1, 4)), lora_dropout=p,
            lora_alpha=draw(st.integers(1, 9)), scaling=draw(st.sampled_from(["vector", "scalar"])),
        )  # fmt: skip
        for parameter in (layer.lora_B, layer.lora_scaling):
            nn.init.normal_(parameter)
        layers[name] = layer
    return layers


def check_group(data, backend: str) -> None:
    layers = data.draw(drawn_group(backend))
    weight = layers["q_proj"].weight
    leading = data.draw(st.sampled_from([(70,), (4, 17)]).flatmap(sizes))
    x = torch.randn(*leading, weight.shape[1], dtype=weight.dtype, device=DEVICE)
    used = data.draw(st.sets(st.sampled_from(sorted(layers)), min_size=1))
    frozen = data.draw(st.sets(st.sampled_from([name for name, _ in layers.named_parameters()])))
    x_wanted, save_inputs = data.draw(st.booleans()), data.draw(st.sampled_from(["exact", "fp8"]))

    def gradients(share_inputs: bool) -> dict[str, Tensor | None]:
        model = copy.deepcopy(layers)
        fuse(model, backend=backend, save_inputs=save_inputs, share_inputs=share_inputs)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name and name not in frozen)
        leaf = x.clone().requires_grad_(x_wanted)
        found: dict = {name: layer(leaf) for name, layer in model.items()}
        total = sum(found[name].sin().sum() for name in used)
        if total.requires_grad:
            total.backward()
        return found | {"x": leaf.grad} | {name: p.grad for name, p in model.named_parameters()}

    with mock.patch.object(functional, "_seed_tensor", lambda seed, device: torch.tensor([7], device=device)):
        together, alone = gradients(True), gradients(False)
    tolerance = 1e-10 if x.dtype == torch.float64 else 1e-4
    for name, wanted in alone.items():
        torch.testing.assert_close(
            together[name], wanted, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@fuzz(20, 100)
@given(data=st.data())
def test_a_group_on_torch(data):
    check_group(data, "torch")


@fuzz(4, 100)
@given(data=st.data())
def test_a_group_on_triton(data):
    check_group(data, "triton")
