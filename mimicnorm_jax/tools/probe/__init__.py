"""The signal in a network, layer by layer, with the theory's prediction beside it."""
