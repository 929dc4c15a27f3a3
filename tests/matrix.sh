#!/bin/sh
# Tests of transformers/ with the oldest supported transformers, put before the one that is installed; the newest is that one.
# Usage: tests/matrix.sh [folder]   (PYTHON=python by default)
set -e
folder=${1:-${TMPDIR:-/tmp}/transformers-5.0.0}
python=${PYTHON:-python}
if [ ! -d "$folder/transformers" ]; then
    "$python" -m pip install --quiet --target "$folder" --no-deps transformers==5.0.0 huggingface-hub==1.3.0 tokenizers==0.22.2 \
        httpx httpcore anyio h11 certifi idna typer-slim shellingham
fi
PYTHONPATH="src:$folder" "$python" -m pytest -n 0 tests/transformers
"$python" -m pytest -n 0 tests/transformers
