"""Kernels with one launch for all experts: one stack for each family of projections, filled one by one."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from quantport import numerics
from quantport.errors import RoutingError
from quantport.kernels.base import WeightSpec
from quantport.kernels.grouped import GroupedKernel
from quantport.kernels.verdict import Claim, Evidence
from quantport.modules import ExpertForm, QuantExperts, routing
from quantport.plugins.registry import default_registry
from quantport.scheme.catalog import BUILTIN

HIDDEN, WIDE, EXPERTS = 64, 32, 4


class Side(GroupedKernel):
    """int8, dequantized: gate and up of an expert share a matrix ``[K, 2 * N]``, so that a weight has strides
    of its own.
    """

    name = "side"
    tolerance = 2.0**-6
    gated = False
    takes_tokens = False

    def __init__(self):
        self.launches = []

    def reasons_against(self, request):
        return ()

    def claim(self, request):
        return Claim(Evidence.DECLARED, "a test")

    def pack(self, stored_weight, spec):
        return stored_weight["weight"].t().contiguous(), stored_weight["weight_scale"].view(-1)

    def unpack(self, packed, spec):
        return {"weight": packed[0].t().contiguous(), "weight_scale": packed[1].reshape(-1, 1)}

    def allocate(self, packed, groups, shared):
        weight, scale = packed
        k, n = weight.shape
        return weight.new_empty(groups, k, shared, n), scale.new_empty(groups, shared, n)

    def expert_view(self, stack, group, which):
        return stack[0][group, :, which], stack[1][group, which]

    def run(self, x, packed, bias, spec):
        return self.run_grouped(x, torch.tensor([0, len(x)]), self.prepare_grouped([packed]), bias, spec)

    def run_grouped(self, x, offsets, stack, bias, spec, shared=1):
        weight, scale = stack
        self.launches.append((weight.data_ptr(), tuple(weight.shape)))
        out = [
            x[a:b].float() @ (w.flatten(1) * s.flatten())
            for a, b, w, s in zip(offsets, offsets[1:], weight, scale, strict=False)
        ]
        return torch.cat(out).to(x.dtype)

    def run_gated(self, x, offsets, gate_up, down, specs, activation):
        if not self.gated:
            return None
        assert activation == "silu"
        y = self.run_grouped(x, offsets, gate_up, None, specs[0], 2)
        self.launches.append("gated")
        return self.run_grouped(F.silu(y[:, :WIDE]) * y[:, WIDE:], offsets, down, None, specs[1])

    def run_token(self, x, experts, weights, gate_up, down, specs, activation):
        if not self.takes_tokens:
            return None
        assert (len(x), activation, specs[0].n) == (1, "silu", WIDE)
        self.launches.append(experts)
        offsets = torch.tensor([0, 1])
        y = torch.zeros(HIDDEN)
        for expert, weight in zip(experts, weights[0], strict=True):
            up, back = (tuple(t[expert : expert + 1] for t in stack) for stack in (gate_up, down))
            rows = self.run_grouped(x, offsets, up, None, specs[0], 2)
            between = F.silu(rows[:, :WIDE]) * rows[:, WIDE:]
            y += weight * self.run_grouped(between, offsets, back, None, specs[1])[0].float()
        return y[None].to(x.dtype)


@pytest.fixture
def kernel(monkeypatch):
    side = Side()
    find = default_registry().kernel
    monkeypatch.setattr(
        type(default_registry()), "kernel", lambda self, name: side if name == "side" else find(name)
    )
    return side


def build(kernel):
    scheme = BUILTIN["int8_weight_only"]
    module = QuantExperts(
        kernel, WeightSpec(scheme, WIDE, HIDDEN), WeightSpec(scheme, HIDDEN, WIDE), EXPERTS, "silu"
    )
    stored = {}
    for i, (name, spec) in enumerate(module.specs.items()):
        weight = torch.randn(spec.n, spec.k, generator=torch.Generator().manual_seed(i)) * 0.05
        stored[name] = numerics.quantize_weight(weight.bfloat16(), scheme)
        module.set_weight(name, {key: t.clone() for key, t in stored[name].items()})
    return module.eval(), stored


def test_experts_of_several_kernels_have_a_stack_for_each_run(kernel):
    """Down of expert 1 has another kernel: down of expert 0, and of 2 and 3, stay side by side."""
    scheme = BUILTIN["int8_weight_only"]
    up, down = WeightSpec(scheme, WIDE, HIDDEN), WeightSpec(scheme, HIDDEN, WIDE)
    other = default_registry().kernel("torch.dequantize")
    module = QuantExperts(kernel, up, down, EXPERTS, "silu", others={"1.down_proj": (other, scheme)})
    _, stored = build(kernel)
    for name, weight in stored.items():
        module.set_weight(name, {key: t.clone() for key, t in weight.items()})
    assert close(module(*given()), expected(stored, *given()))
    assert [shape for _, shape in kernel.launches] == [
        (EXPERTS, HIDDEN, 2, WIDE),
        (1, WIDE, 1, HIDDEN),
        (2, WIDE, 1, HIDDEN),
    ]
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.buffers()}
    assert sum(memory.values()) == sum(t.nbytes for w in stored.values() for t in w.values())


def test_a_token_goes_to_a_kernel_that_takes_it_whole(kernel):
    """A single one, with all of its experts there; and none in a graph that wants a gradient."""
    module, stored = build(kernel)
    kernel.takes_tokens = True
    x, index, weights = given(1)
    with torch.no_grad():
        y = module(x, index, weights)
    assert kernel.launches[0] == index[0].tolist()
    assert close(y, expected(stored, x, index, weights))
    for experts in ([EXPERTS, 1], [-1, 1]):
        kernel.launches.clear()
        module(x, torch.tensor([experts]), weights[:, :2])
        assert all(isinstance(launch, tuple) for launch in kernel.launches)
    with pytest.raises(RoutingError, match="1 entries above it"):
        module(x, torch.tensor([[EXPERTS + 1, 1]]), weights[:, :2])


@pytest.mark.parametrize("experts", [1, 5])
def test_few_slots_are_sorted_as_many_are(experts):
    flat = torch.randint(-2, experts + 1, (200,))
    few, (order, _, below) = routing._sort_few(flat, experts), routing._sorted(flat, experts)
    assert few.bounds == below[: experts + 1].tolist() == few.offsets.tolist()
    assert torch.equal(few.order, order[: few.bounds[-1]])
    assert (few.order.dtype, few.offsets.dtype) == (order.dtype, below.dtype)


def given(rows=7):
    index = torch.stack([torch.arange(rows) % 3, (torch.arange(rows) + 1) % 3], 1)
    x = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(9)).bfloat16()
    return x, index, torch.full((rows, 2), 0.5, dtype=torch.bfloat16)


def expected(stored, x, index, _):
    out = torch.zeros(x.shape)
    for t, e in [(t, e) for t, chosen in enumerate(index.tolist()) for e in chosen]:
        kept = (stored[f"{e}.{p}"] for p in ("gate_proj", "up_proj", "down_proj"))
        weights = [w["weight"].float() * w["weight_scale"] for w in kept]
        out[t] += (
            0.5 * (F.silu(x[t].float() @ weights[0].t()) * (x[t].float() @ weights[1].t())) @ weights[2].t()
        )
    return out


def close(y, want):
    return (y.float() - want).abs().max() <= 2**-6 * want.abs().max()


@pytest.mark.parametrize("gated", [False, True])
def test_experts_run_over_two_stacks_that_hold_every_weight_once(kernel, gated):
    kernel.gated = gated
    module, stored = build(kernel)
    assert close(module(*given()), expected(stored, *given()))
    (up, up_shape), (down, down_shape) = (launch for launch in kernel.launches if launch != "gated")
    assert (up_shape, down_shape) == ((EXPERTS, HIDDEN, 2, WIDE), (EXPERTS, WIDE, 1, HIDDEN))
    assert ("gated" in kernel.launches) is gated
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.buffers()}
    assert {up, down} <= set(memory)
    assert sum(memory.values()) == sum(t.nbytes for w in stored.values() for t in w.values())
    assert all(torch.equal(module.stored_weight(n)[k], t) for n, w in stored.items() for k, t in w.items())


def test_what_is_loaded_again_goes_into_the_same_slots(kernel):
    module, stored = build(kernel)
    before = [t.data_ptr() for t in module.buffers()]
    other, _ = build(kernel)
    other.load_state_dict({k: torch.zeros_like(t) for k, t in module.state_dict().items()})
    assert not other(*given()).any()
    module.load_state_dict({k: t.clone() for k, t in module.state_dict().items()})
    assert [t.data_ptr() for t in module.buffers()] == before
    assert close(module(*given()), expected(stored, *given()))


def test_another_kernel_reads_the_stacks_as_they_are(kernel):
    module, stored = build(kernel)
    other = type(kernel)()
    module.bind(other, {})
    assert close(module(*given()), expected(stored, *given()))
    assert other.launches


def test_an_activation_that_is_exchanged_is_the_one_that_runs(kernel):
    module, _ = build(kernel)
    silu = module(*given())
    module.form = ExpertForm("relu")
    relu = module(*given())
    assert not close(relu, silu)
    module.form = ExpertForm("silu")
    assert torch.equal(module(*given()), silu)


def test_copies_have_stacks_of_their_own(kernel):
    module, stored = build(kernel)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        kernel.launches.clear()
        assert close(twin(*given()), expected(stored, *given()))
        mine = {t.untyped_storage().data_ptr() for t in module.buffers()}
        assert not mine & {place for place, _ in kernel.launches}


def test_weights_that_were_moved_one_by_one_are_gathered(kernel):
    """As accelerate moves them: each buffer is exchanged."""
    module, stored = build(kernel)
    for key in list(module._buffers):
        module._buffers[key] = module._buffers[key].clone()
    assert close(module(*given()), expected(stored, *given()))


@pytest.mark.parametrize("shared", [1, 2])
def test_weights_that_were_packed_one_by_one_are_copied_into_a_stack(shared):
    kernel = Side()
    weights = [
        (torch.full((4, 3), i, dtype=torch.int8), torch.full((3,), float(i))) for i in range(2 * shared)
    ]
    stack = kernel.prepare_grouped(weights, shared)
    for i, weight in enumerate(weights):
        view = kernel.expert_view(stack, *divmod(i, shared))
        assert all(torch.equal(a, b) for a, b in zip(view, weight, strict=True))
    (alone,) = weights[:1]
    assert kernel.prepare_grouped([alone])[0].data_ptr() == alone[0].data_ptr()


class NoWaiting(TorchDispatchMode):
    """Refuses whatever makes the host wait for a device."""

    WAITING = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "bincount",
        "masked_select",
        "_unique2",
        "is_nonzero",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.WAITING, f"the host waits for {func}"
        return func(*args, **(kwargs or {}))


class Silent(Side):
    """The same without a loop on the host: every row by every weight, of which a mask keeps one."""

    def run_grouped(self, x, offsets, stack, bias, spec, shared=1):
        weight, scale = stack
        rows = torch.arange(len(x), dtype=torch.int32, device=x.device)
        own = (rows >= offsets[:-1, None]) & (rows < offsets[1:, None])
        dense = weight.flatten(2).float() * scale.flatten(1)[:, None]
        return ((x.float() @ dense) * own[..., None]).sum(0).to(x.dtype)


@pytest.fixture
def on_device(monkeypatch):
    """Tensors of the host are routed as those of an accelerator are."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)


@pytest.mark.parametrize("nowhere", [False, True])
@pytest.mark.parametrize("operator", [False, True])
def test_nothing_waits_for_an_accelerator(on_device, nowhere, operator, monkeypatch):
    module, stored = build(Silent())
    x, index, routing = given()
    if nowhere:
        index[::3], index[1, 1] = EXPERTS, -1
    with NoWaiting(), torch.no_grad(), monkeypatch.context() as patch:
        for name in (
            "tolist",
            "item",
            "__bool__",
            "__int__",
        ):  # which pass the dispatcher by
            patch.setattr(torch.Tensor, name, lambda self: pytest.fail("the host waits"))
        y = (
            torch.ops.quantport.experts(x, index, routing, *module.operands())
            if operator
            else module(x, index, routing)
        )
    want = torch.zeros(x.shape)
    for j in range(2):
        here = (index[:, j] >= 0) & (index[:, j] < EXPERTS)
        want[here] += expected(stored, x[here], index[here, j : j + 1], None)
    assert close(y, want)


def test_an_accelerator_refuses_experts_that_are_not_there(on_device, monkeypatch):
    module, _ = build(Silent())
    x, index, routing = given()
    index[3, 1] = EXPERTS + 1
    with torch.no_grad(), pytest.raises(RuntimeError, match="try: 0 to 3; -1 or 4 for nowhere"):
        module(x, index, routing)
    monkeypatch.setattr("quantport.modules.routing._asserts", lambda device_type: False)
    with NoWaiting(), torch.no_grad():
        y = module(x, index, routing)
    assert y[3].isnan().all(), "a device without assertions"
    assert not y[[0, 1, 2, 4, 5, 6]].isnan().any()


def test_the_host_waits_once_for_kernels_that_loop(on_device, monkeypatch):
    module, stored = build(default_registry().kernel("torch.dequantize"))
    tolist, lists = torch.Tensor.tolist, []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(1) or tolist(self))
    with NoWaiting(), torch.no_grad():
        y = module(*given())
    assert len(lists) == 1
    assert close(y, expected(stored, *given()))


def test_what_waits_is_kept_out_of_captured_graphs():
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    if unsafe is None:
        pytest.skip("this torch has no tag for it")
    captured = ("linear", "linear_no_grad", "embedding", "experts", "experts_no_grad")
    waiting = ("experts_loop", "experts_loop_no_grad", "grouped_linear")
    tags = {name: getattr(torch.ops.quantport, name).default.tags for name in captured + waiting}
    assert tuple(name for name in tags if unsafe in tags[name]) == waiting


def test_a_graph_holds_the_stacks_and_not_every_expert(kernel):
    module, stored = build(kernel)
    tensors, sizes, handle = module.operands()
    assert [t.shape[0] for t in tensors] == [EXPERTS] * 4
    assert sizes == [2, 2]
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(module, fullgraph=True, backend=look)(*given())
    torch._dynamo.reset()
    assert close(y, expected(stored, *given()))
    (call,) = [n for n in graphs[0].graph.nodes if n.op == "call_function" and "quantport" in str(n.target)]
    assert len(call.args[3]) == 4
    assert call.args[5] == handle


def test_an_exchanged_buffer_is_seen_whichever_it_is():
    """Plain kernels: the weights of each expert are buffers, gathered once."""
    module, stored = build(default_registry().kernel("torch.dequantize"))
    gathered = module._group_weights()
    assert module._group_weights() is gathered
    name = f"{EXPERTS - 2}.down_proj"
    key = module._buffer_names[name][1]
    module._buffers[key] = module._buffers[key] * 0
    module._buffers[module._buffer_names["1.gate_proj"][0]].zero_()
    stored["1.gate_proj"]["weight"].zero_()
    stored[name]["weight_scale"].zero_()
    assert close(module(*given()), expected(stored, *given()))


def test_a_pickle_holds_each_weight_once(kernel):
    module, stored = build(kernel)
    assert len(pickle.dumps(module)) < 3 * sum(t.nbytes for w in stored.values() for t in w.values())
