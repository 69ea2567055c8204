"""Measurements: each prints human text and, as its last line, one JSON object."""
