"""Recipes: one readable file per published result, run with ``eggroll recipe NAME`` or ``python recipes/NAME.py``."""
