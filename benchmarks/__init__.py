"""Benchmarks of tf_syncdist, each one run with `python -m benchmarks.NAME`."""
