"""Measurements. Each prints a table for people and returns the figures that end up in one JSON object."""
