"""From text to micro-batches: cleaning, tokenizer, shards, catalog, sampler, loader."""
