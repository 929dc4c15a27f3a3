"""``python -m thrift_attn`` is the ``thrift`` command."""

from thrift_lab.cli import main

main()
