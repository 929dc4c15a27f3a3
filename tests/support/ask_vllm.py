"""An engine in a process of its own: reads what to do from its argument, and prints what it answers."""

from __future__ import annotations

import json
import sys

from support.vllm_engine import ask, engine

if __name__ == "__main__":  # workers of a second rank import this file as well
    import vllm

    given = json.loads(sys.argv[1])
    vllm.__version__ = given.get("version", vllm.__version__)
    with engine(given["model"], given.get("thrift"), **given.get("options", {})) as llm:
        print(json.dumps(ask(llm, given["prompts"])))
