"""Readers of the benchmarks' published files: folders to questions. What is asked of a model is in ``eval/``."""

from xverse.data.benchmarks.question import Question, Reading, Subject

__all__ = ["Question", "Reading", "Subject"]
