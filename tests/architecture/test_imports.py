"""The package is quick to import and pulls in nothing it does not need."""

import json
import subprocess
import sys

PROBE = """
import json, sys, time
import torch
start = time.perf_counter()
import thrift_attn
seconds = time.perf_counter() - start
heavy = [m for m in ("transformers", "triton", "typer", "rich", "matplotlib", "numpy.f2py") if m in sys.modules]
print(json.dumps({"seconds": seconds, "heavy": heavy}))
"""


def test_import_is_quick_and_light():
    runs = [json.loads(subprocess.check_output([sys.executable, "-c", PROBE])) for _ in range(3)]
    torch_only = "import sys, torch, json; print(json.dumps([m for m in ('triton',) if m in sys.modules]))"
    already = json.loads(subprocess.check_output([sys.executable, "-c", torch_only]))
    assert set(runs[0]["heavy"]) <= set(already)
    assert min(r["seconds"] for r in runs) < 0.3
