"""Evaluation: the benchmarks of XVERSE's tables, exactly defined; scoring, reports, comparison."""
