"""Comparisons with other programs on the same machine in the same run."""
