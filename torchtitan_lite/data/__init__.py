"""From files to micro-batches: sources, tokenizer, prepared shards, global order, loader."""
