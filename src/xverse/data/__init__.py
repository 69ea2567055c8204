"""Text to token shards to mixture to packed batches; instructions for fine-tuning."""
