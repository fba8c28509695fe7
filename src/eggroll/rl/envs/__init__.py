"""Environments in JAX: one adapter a library, and a registry of names. Nothing is imported before it is asked for."""
