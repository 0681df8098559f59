"""Benchmarks, and how their answers are graded, cached, counted and compared."""
