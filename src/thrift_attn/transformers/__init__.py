"""Frameworks that thrift attention plugs into, one file each; none of them is imported unless asked for."""
