"""The pieces of a decoder: linear layers, embeddings, norms. They own weights and know their rank's share."""
