"""The algorithm in NumPy and the standard library: noise, fitness, selection, records, and the oracle."""
