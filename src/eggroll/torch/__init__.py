"""EGGROLL for PyTorch: noise, perturbed weights, populations and the update."""
