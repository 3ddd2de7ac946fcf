"""Building blocks: attention and its masks, layers, embeddings, heads."""
