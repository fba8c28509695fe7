"""Evaluators: who computes the members' scores. ``hf`` runs the Hugging Face model itself as a population."""
