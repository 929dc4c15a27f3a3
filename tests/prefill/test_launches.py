"""How the operator of prefill is called: device, graphs, fake tensors, strides, bad bounds and large grids."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from support.device import DEVICE
from support.prefill import draw
from thrift_attn import ThriftConfig, attention, attention_varlen, fraction, seq_layout
from thrift_attn.kernels import launcher
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.prefill import ops, select
from thrift_attn.prefill.bundles import KernelNumerics
from thrift_attn.prefill.pack import quantise_kv, quantise_q
from thrift_attn.prefill.select import plan_blocks
from thrift_attn.seq_layout import KeptTensors, dense, packed

CONFIG = ThriftConfig(base_format="nvfp4", compute="16bit", sink_token="none", smooth="none", budget=fraction(0.5))
DEV = torch.device(DEVICE)


def test_kernels_start_under_a_guard_of_their_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of a call starts while the guard of q's device is open, and nothing is guarded after it."""
    guarded, seen = [], []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            guarded.append(self.device)

        def __exit__(self, *_) -> None:
            guarded.pop()

    monkeypatch.setattr(ops, "on_device_of", lambda x: Guard(x.device))
    for module in ("attend", "pack", "select", "statistics"):
        owner = getattr(__import__(f"thrift_attn.prefill.{module}").prefill, module)
        start = owner.launch
        monkeypatch.setattr(owner, "launch", lambda *a, f=start, **o: (seen.append(list(guarded)), f(*a, **o)))
    q, k, v = draw(1, (1, 1), 20, 20, 64)
    ops.prefill(q, k, v, dense(1, 20, 20, True, q.device), ThriftConfig(base_format="nvfp4"), "decoded", scale=0.1)
    assert len(seen) == 7
    assert all(devices == [q.device] for devices in seen)
    assert not guarded


def test_the_guard_is_that_of_cuda_and_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(launcher.on_device_of(torch.zeros(1)), nullcontext)
    opened = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: opened.append(device) or nullcontext())

    class OnGpu(Tensor):
        is_cuda = True
        device = torch.device("cuda:1")

    launcher.on_device_of(torch.zeros(1).as_subclass(OnGpu))
    assert opened == [torch.device("cuda:1")]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one() -> None:
    torch.manual_seed(0)
    q, k, v = (x.cuda(1) for x in draw(1, (2, 1), 300, 300, 64))
    with torch.cuda.device(0):
        got = attention(q, k, v, config=CONFIG, backend="triton")
    want = attention(q, k, v, config=CONFIG, backend="reference")
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("met", [False, True])
def test_a_graph_holds_all_that_it_reads(met: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays are right after the tensors kept for other calls have come and gone, and a first call may be captured."""
    torch.manual_seed(1)
    q, k, v = draw(1, (2, 1), 333, 333, 64)
    want = attention(q, k, v, config=CONFIG, backend="triton")
    for module, name in ((seq_layout, "_SPANS"), (select, "_WANTED")):
        monkeypatch.setattr(module, name, KeptTensors(room=1))
    if met:
        attention(q, k, v, config=CONFIG, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, config=CONFIG, backend="triton")
    for tokens in (100, 200):
        attention(q[:, :, :tokens], k[:, :, :tokens], v[:, :, :tokens], config=CONFIG, backend="triton")
    junk = [torch.full((6,), 2**30, dtype=torch.int32, device="cuda") for _ in range(5000)]
    graph.replay()
    assert torch.equal(out, want)
    del junk


def test_what_a_capture_was_given_is_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others go in the order of their last use; a capture makes nothing itself."""
    kept, cpu, made = KeptTensors(room=2), torch.device("cpu"), []

    def get(key: int, capturing: bool = False) -> Tensor | None:
        monkeypatch.setattr(seq_layout, "_capturing", lambda device: capturing)
        return kept.get(key, cpu, lambda: made.append(key) or torch.tensor(key))

    assert get(0, capturing=True) is None
    first, second = get(0), get(1)
    assert get(0, capturing=True) is first
    for key in (2, 3):
        get(key)
    assert get(0) is first
    assert get(0, capturing=True) is first
    assert get(2) is not None
    assert get(1) is not second
    assert made == [0, 1, 2, 3, 1]
    get(2)
    get(3)
    assert made == [0, 1, 2, 3, 1, 3]  # 3 went when 1 came again, since 2 had been asked for


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 70, 333), (1, 333, 333), (3, 65, 64)])
@pytest.mark.parametrize("causal", [True, False])
def test_what_is_made_on_the_device_equals_what_is_kept(shape, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts, plans = [], []
    numerics = PrefillNumerics.resolve(ThriftConfig(base_format="nvfp4", budget=fraction(0.3)))
    for keep in (True, False):
        if not keep:
            monkeypatch.setattr(KeptTensors, "get", lambda *_: None)
        layouts.append(dense(*shape, causal, DEV))
        plans.append(plan_blocks(numerics, layouts[-1], window=100 if causal else None))
    assert torch.equal(layouts[0].spans, layouts[1].spans)
    assert layouts[0].pack() == layouts[1].pack()
    assert torch.equal(plans[0].wanted.expand_as(plans[1].wanted), plans[1].wanted)
    assert plans[0].capacity == plans[1].capacity


def test_fake_tensors_are_not_kept() -> None:
    numerics = PrefillNumerics.resolve(CONFIG)
    with FakeTensorMode():
        fake = plan_blocks(numerics, dense(1, 37, 91, True, torch.device("cpu"))).wanted
        assert type(fake) is not Tensor
    layout = dense(1, 37, 91, True, torch.device("cpu"))
    assert type(layout.spans) is Tensor
    assert type(plan_blocks(numerics, layout).wanted) is Tensor
    with torch.device("meta"):
        assert dense(1, 38, 91, True, torch.device("cpu")).spans.device.type == "cpu"


def test_the_fake_output_has_the_strides_of_the_real_one() -> None:
    q, k, v = draw(1, (1, 1), 20, 20, 64)
    turned = q.mT.contiguous().mT  # not contiguous in D
    arguments = (dense(1, 20, 20, True, q.device), CONFIG, "decoded")
    real = ops.prefill(turned, k, v, *arguments, scale=0.1)[0]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = ops.prefill(*map(mode.from_tensor, (turned, k, v)), *arguments, scale=0.1)[0]
    assert fake.stride() == real.stride()
    assert torch.equal(real, ops.prefill(q, k, v, *arguments, scale=0.1)[0])


def test_launchers_refuse_rows_that_are_not_contiguous() -> None:
    x = torch.zeros(1, 1, 64, 20, dtype=torch.float16, device=DEVICE).mT
    layout = dense(1, 20, 20, True, x.device)
    numerics = KernelNumerics.of(PrefillNumerics.resolve(CONFIG), "decoded")
    with pytest.raises(ValueError, match="k must be contiguous in its last dimension"):
        quantise_kv(x, x.contiguous(), layout=layout, numerics=numerics)
    with pytest.raises(ValueError, match="q must be contiguous in its last dimension"):
        quantise_q(x, layout=layout, numerics=numerics)


def test_grids_that_cuda_cannot_start_are_refused() -> None:
    with pytest.raises(ValueError, match="65535"):
        launcher.launch(None, (1, 8, 65536))
    started = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **meta: started.append(grid)

    launcher.launch(Kernel(), (1 << 20, 65535, 65535))
    launcher.launch(Kernel(), (0, 1))
    assert started == [(1 << 20, 65535, 65535)]


@pytest.mark.parametrize(
    ("cu", "total", "longest", "want"),
    [
        ([0, 100, 200], 200, 100, ([0, 100], [100, 100])),
        ([0, 150, 200], 200, 100, ([0, 150], [100, 50])),  # longer than said
        ([0, 100, 264], 200, 100, ([0, 100], [100, 100])),  # beyond the end
        ([-5, 100, 50], 200, 200, ([0, 100], [100, 0])),  # negative, and decreasing
        ([0, 100, 0, 100], 200, 200, ([0, 100, 100], [100, 0, 0])),  # no token has two owners
    ],
)
def test_bounds_are_clamped(cu, total: int, longest: int, want) -> None:
    cu = torch.tensor(cu, device=DEVICE)
    layout = packed(cu, cu, queries=total, keys=total, max_queries=longest, max_keys=longest, causal=True)
    assert layout.spans[:, seq_layout.Q_START].tolist() == want[0]
    assert layout.q_len.tolist() == layout.k_len.tolist() == want[1]
    ends = layout.spans[:, seq_layout.BLOCK_START] + -(-layout.k_len // 64)
    assert int(ends.max()) <= layout.blocks


def test_queries_that_no_sequence_owns_give_nothing() -> None:
    """Between, before and after the sequences, and beyond what is said to be the longest."""
    torch.manual_seed(3)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in draw(1, (2, 1), 100, 100, 64))
    cu = torch.tensor([10, 40, 90], device=DEVICE, dtype=torch.int32)
    layout = packed(cu, cu, queries=100, keys=100, max_queries=30, max_keys=30, causal=True)
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    out, lse, _, share = ops.prefill(*heads_first, layout, CONFIG, "decoded", scale=0.125, high_fraction=True)
    owned = torch.zeros(100, dtype=torch.bool, device=DEVICE)
    owned[10:70] = True
    assert (out[0, :, ~owned] == 0).all()
    assert (lse[0, :, ~owned] == -math.inf).all()
    assert (share[0, :, ~owned] == 0).all()
    ends = torch.tensor([0, 30, 60], device=DEVICE)
    alone = attention_varlen(
        q[10:70], k[10:70], v[10:70], ends, ends, 30, 30, config=CONFIG, scale=0.125, backend="triton"
    )
    torch.testing.assert_close(out[0, :, 10:70].transpose(0, 1), alone, rtol=0, atol=0)


@pytest.mark.parametrize(("low", "compute"), [("nvfp4", "fp4"), ("nvfp4", "16bit")])
def test_a_budget_of_one_is_exact_inside_a_window(low: str, compute: str) -> None:
    """Up to 16 new tokens share a list; a block that only the first of them sees is on it as well."""
    torch.manual_seed(4)
    q, k, v = draw(1, (2, 1), 16, 333, 64)
    config = ThriftConfig(base_format=low, compute=compute, budget=fraction(1.0))
    out = attention(q, k, v, config=config, window=64, backend="triton")
    at, keys = torch.arange(317, 333, device=DEVICE)[:, None], torch.arange(333, device=DEVICE)
    s = (q.double() @ k.double().mT / 8).masked_fill((keys > at) | (keys <= at - 64), -torch.inf)
    want = s.softmax(-1) @ v.double()
    assert (out.double() - want).norm() < 3e-3 * want.norm()
