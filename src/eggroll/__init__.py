"""EGGROLL: train any model on any score, without gradients."""
