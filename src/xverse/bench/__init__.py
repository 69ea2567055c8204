"""Measurements. Each prints a table and returns its figures for one JSON object."""
