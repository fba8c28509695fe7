"""Where activations hold the members: read off a call, probed before a model's first one, decided per operation."""
