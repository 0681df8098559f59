"""Benchmarks: how their answers are cached, graded, counted and compared."""
