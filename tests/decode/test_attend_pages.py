"""One decode step against float64, at small odd shapes; the same kernels interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from support.paged import DEVICE, expected, make_cache, run


def budget_table(capacity: int, f: float):
    return torch.tensor([int(f * n + 0.5) for n in range(capacity + 1)], dtype=torch.int32, device=DEVICE)


def check(lengths, heads, kv_heads, dim, tq=1, plane="nested", dtype=torch.float16, f=0.3, splits=3, **options):
    cache = make_cache(lengths, kv_heads, dim, plane=plane, dtype=dtype)
    torch.manual_seed(1)
    q = (torch.randn(len(lengths), heads, tq, dim) * 2).to(dtype).to(DEVICE)
    capacity = cache.page_table.shape[1]
    out, lse, blocks, counts, _, _ = run(cache, q, budget_table(capacity, f), splits=splits, **options)
    for name in ("splits", "first", "last"):
        options.pop(name, None)
    want, want_lse = expected(cache, q, blocks, counts, **options)
    assert not out.isnan().any()
    error = (out.cpu().double() - want).norm() / want.norm()
    assert error < (1e-3 if dtype == torch.float16 else 4e-3), error
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=0, atol=3e-3)
    return cache, blocks, counts


@pytest.mark.parametrize("plane", ["nested", "nested8", "16bit", None])
def test_planes(plane) -> None:
    check([64 * 5 + 7, 64 * 3], 8, 2, 64, plane=plane, f=0.4 if plane else 0.0)


@pytest.mark.parametrize("dim", [80, 96, 128])
def test_head_dims(dim: int) -> None:
    check([64 * 3 + 33], 4, 2, dim)


def test_wide_heads() -> None:
    check([64 * 2 + 1], 2, 1, 256)


@pytest.mark.parametrize("group", [1, 7, 12])
def test_groups(group: int) -> None:
    check([64 * 3 + 5], group * 2, 2, 64)


@pytest.mark.parametrize("length", [64 * 4 + 5, 64 * 4, 70, 5])
def test_new_tokens_are_causal(length: int) -> None:
    check([length], 6, 2, 64, tq=5)


def test_many_rows() -> None:
    check([64 * 3 + 9], 8, 2, 64, tq=7)


@pytest.mark.parametrize(("window", "tq"), [(100, 1), (64, 3), (1, 2), (1000, 2)])
def test_window(window: int, tq: int) -> None:
    check([64 * 5 + 20, 90], 4, 2, 64, tq=tq, window=window)


@pytest.mark.parametrize("tq", [1, 2])
def test_softcap(tq: int) -> None:
    check([64 * 3 + 20], 4, 2, 64, tq=tq, softcap=5.0)


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_short(length: int) -> None:
    check([length], 4, 2, 64)


@pytest.mark.parametrize("f", [0.0, 1.0])
def test_budget_ends(f: float) -> None:
    _, _, counts = check([64 * 4 + 3], 4, 2, 64, f=f)
    assert counts[..., 0].unique().tolist() == [4 * int(f)]


@pytest.mark.parametrize(
    ("splits", "f"),
    [
        (1, 0.3),
        (9, 0.3),
        (4, 0.85),
        *(pytest.param(n, f, marks=pytest.mark.slow) for n, f in ((2, 0.3), (4, 0.5), (5, 1.0))),
    ],
)
def test_every_way_of_dealing(splits: int, f: float) -> None:
    """More and fewer splits than promoted blocks, than others, and than steps of the incomplete block."""
    check([64 * 6 + 37, 64 * 2], 2, 1, 64, splits=splits, f=f)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's matrix product is wrong on bf16")
@pytest.mark.parametrize("plane", ["nested", "nested8", "16bit"])
def test_bf16(plane: str) -> None:
    check([64 * 9 + 7, 64 * 3], 8, 2, 128, plane=plane, dtype=torch.bfloat16)
