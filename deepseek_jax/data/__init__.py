"""Text to batches: sources, tokenizer, token cache, packing, and `make_data`."""
