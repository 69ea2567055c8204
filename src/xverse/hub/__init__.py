"""Fetching: what ``--model`` and dataset names refer to, from Hugging Face, ModelScope or this disk."""
