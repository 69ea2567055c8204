"""What a run reads (shards, mixture, packing, order, feed), corpus preparation, dialogues and benchmarks."""
