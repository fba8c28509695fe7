"""Quantized models trained in their own format: integer codes are perturbed around, and moved."""
