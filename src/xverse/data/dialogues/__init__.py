"""Conversations for fine-tuning: every file format that is read, as one kind of dialogue."""
