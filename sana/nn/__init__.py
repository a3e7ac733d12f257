"""Parts of networks: blocks, attention, Mix-FFN, embeddings, norms. Nothing here knows a whole network or a family."""
