"""Benchmarks of the loop: figures to look at, never a test. See ``README.md`` in this folder."""
