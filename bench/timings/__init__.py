"""Benchmarks for asv (`tox run -e asv`): time, memory and the statistics themselves, across commits."""
