"""The model itself: its number format, its parameters, its noise, and its arithmetic in NumPy and in floating point."""
