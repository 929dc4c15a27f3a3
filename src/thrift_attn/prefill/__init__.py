"""Prefill on a GPU: contiguous K and V are quantised, blocks selected, attention computed."""
