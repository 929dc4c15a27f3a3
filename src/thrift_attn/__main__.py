"""``python -m thrift_attn`` is the ``thrift`` command."""

from thrift_attn.cli import main

main()
