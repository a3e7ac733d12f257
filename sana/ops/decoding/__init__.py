"""What an autoencoder's decoder does around its large convolutions, for inference; each in one pass over the map."""
