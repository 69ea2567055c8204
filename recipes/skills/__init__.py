"""Dialogues for the skills of a small chat model, and its exam: ``python -m recipes.skills --out FILE``.

One module for each skill makes dialogues from templates, fillers and phrasings; ``common.py`` divides fillers and
phrasings between training and exam. Everything depends on the seed only.
"""
