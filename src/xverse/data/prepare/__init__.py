"""Corpus preparation: text files to cleaned, deduplicated, tokenised shards."""
