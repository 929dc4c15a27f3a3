"""``python -m thrift_lab.bench`` is ``thrift bench``."""

from thrift_lab.bench.bench_cli import app

app()
