"""The laboratory: evaluation, benchmarks and the command line. The library never imports it."""
