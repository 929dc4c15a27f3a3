"""Device functions that prefill and decode share, one copy each."""
