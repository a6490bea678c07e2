"""The losses of merged blocks, measured once, and the clustering that they decide."""
