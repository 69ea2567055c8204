"""Benchmark questions, read once for scoring and for decontamination."""
