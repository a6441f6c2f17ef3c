"""Benchmarks: dataset readers, metrics, the runner behind `dmv-fast eval`, plots."""
