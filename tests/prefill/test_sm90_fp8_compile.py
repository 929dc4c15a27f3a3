"""The FP8 prefill kernel compiles for a GPU that is not there: FP8 wgmma, registers per warp group, nothing serialised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from thrift_attn import dispatch
from thrift_attn.prefill.bundles import LogitRules, PrefillOutput, PrefillTensors
from thrift_attn.prefill.pack import PackedKV, PackedQ
from thrift_attn.prefill.sm90_fp8.launch import attend_fp8

# Kernels that were imported for the interpreter cannot be compiled, so this runs in a process of its own.
_PROGRAM = """
import json, re, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from thrift_attn.prefill.sm90_fp8.kernel import attend_fp8_kernel as fn

options = json.loads(sys.argv[1]) | {"CAUSAL": True, "PROMOTE": True}
dim, half = options["D"], options.pop("half")

def descriptor(dtype, bits, *shape):
    layout = gl.NVMMASharedLayout(min(128, shape[-1] * bits // 8), bits, len(shape))
    return f"tensordesc<{dtype}{list(shape)},{layout!r}>"

signature = dict.fromkeys(fn.arg_names, "i32")
signature.update({n: descriptor(half, 16, 1, 1, rows, dim) for n, rows in
                  dict(q_desc=128, k_desc=64, v_desc=64, out_desc=64).items()})
signature.update({n: descriptor("fp8e4nv", 8, 1, 128, dim) for n in ("q8_desc", "k8_desc")})
signature.update(v8_desc=descriptor("fp8e4nv", 8, 1, dim, 128), c_desc=descriptor(half, 16, 1, 32, dim))
signature.update({n: "*fp32" for n in ("q_scale_ptr", "k_scale_ptr", "v_scale_ptr", "sink_logits_ptr", "lse_ptr")})
signature.update(out_ptr="*" + half, v_ptr="*" + half, scale="fp32", cap="fp32")
signature.update(block_indices_ptr="*i32", block_counts_ptr="*i32")
signature.update({n: "constexpr" for n in options})
kernel = triton.compile(
    GluonASTSource(fn, signature, constexprs=options), target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4)
)
ptx = Path(sys.argv[2])
ptx.write_text(kernel.asm["ptx"])
for name in ("ptxas", "ptxas-blackwell"):  # the second one where the first is too old for this Triton
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    command = [tool, "-v", "--gpu-name=sm_90a", ptx, "-o", ptx.with_suffix(".cubin")]
    log = subprocess.run(command, capture_output=True, text=True)
    if log.returncode == 0:
        break
text = kernel.asm["ptx"]
print(json.dumps(dict(
    warnings=re.findall(r"\\(C75\\d\\d\\).*", log.stderr), shared=kernel.metadata.shared, warps=kernel.metadata.num_warps,
    spills=int(re.search(r"(\\d+) bytes spill stores", log.stderr)[1]),
    scores=len(re.findall(r"wgmma.mma_async.sync.aligned.m64n128k32.f16.e4m3.e4m3", text)),
    weighted=len(re.findall(r"wgmma.mma_async.sync.aligned.m64n\\d+k32.f32.e4m3.e4m3", text)),
    wide=len(re.findall(r"wgmma.mma_async.sync.aligned.m64n\\d+k16.f32.(?:b?f16).(?:b?f16)", text)),
    registers=sorted(map(int, set(re.findall(r"setmaxnreg.\\w+.sync.aligned.u32\\s+(\\d+)", text)))),
    loads=text.count("cp.async.bulk.tensor"), shuffles=text.count("shfl.sync"),
)))
"""


@pytest.mark.parametrize(
    "options",
    [
        {"D": 128, "half": "bf16", "GROUP": 4, "WINDOW": False, "CAP": False, "CENTRED": True, "SINK": True},
        {"D": 64, "half": "fp16", "GROUP": 1, "WINDOW": True, "CAP": True, "CENTRED": False, "SINK": False},
    ],
    ids=["d128", "d64 window softcap"],
)
def test_compiles_for_hopper(options: dict, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PROGRAM, json.dumps(options), str(tmp_path / "kernel.ptx")]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    # Two consumers; Q K before the loop of the low pass and in it; P V and the row sums in it and after it.
    assert facts["scores"] == 2 * 2 * (options["D"] // 32), facts
    assert facts["weighted"] == 2 * 2 * 2 * (128 // 32), facts
    assert facts["wide"] >= 2 * 3 * (options["D"] // 16), facts  # the promoted blocks
    assert facts["warnings"] == [], facts  # serialised products, or registers that could not be handed over
    assert facts["registers"][0] == 40, facts
    assert 232 in facts["registers"], facts
    assert facts["shared"] <= 227 * 1024, facts
    assert facts["warps"] == 12, facts
    assert facts["spills"] <= 1024, facts


def test_refuses_what_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.6.0")
    x = torch.zeros(1, 2, 128, 128, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="CUDA device"):
        attend_fp8(
            PrefillTensors(x, x, x),
            packed_q=PackedQ(x),
            packed_kv=PackedKV(x),
            lists=None,
            rules=LogitRules(1.0),
            into=PrefillOutput(x, x[..., 0].float(), x),
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    class Cuda(torch.Tensor):
        device = torch.device("cuda")

    def on_gpu(t: torch.Tensor) -> torch.Tensor:
        return t.as_subclass(Cuda)

    y = on_gpu(x)
    assert dispatch.why_not_sm90_fp8(y, y, y, causal=True, scale=1.0) is None
    for q, options, reason in [
        (y.float(), {}, "float16 or bfloat16"),
        (y[..., :80].contiguous(), {}, "head dims"),
        (y, {"scale": -1.0}, "positive scale"),
        (y[:, :, :, 1:65], {}, "q with contiguous rows"),
        (torch.cat([y, y], 2), {}, "Tq <= Tk"),
    ]:
        problem = dispatch.why_not_sm90_fp8(on_gpu(q), y, y, **{"causal": True, "scale": 1.0, **options})
        assert problem is not None, reason
        assert reason in problem
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.5.1")
    assert "Gluon of Triton 3.6 to 3.9, got Triton 3.5.1" in (
        dispatch.why_not_sm90_fp8(y, y, y, causal=True, scale=1.0) or ""
    )
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert "compute capability 9.0" in (dispatch.why_not_sm90_fp8(y, y, y, causal=True, scale=1.0) or "")
