"""``python -m thrift_attn.bench`` is ``thrift bench``."""

from thrift_attn.bench.command import app

app()
