"""Speed and quality through vLLM's engine: thrift beside vLLM's own attention with 16-bit and with FP8 pages."""
