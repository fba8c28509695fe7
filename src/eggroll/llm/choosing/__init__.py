"""Settings that nobody gave: a few evaluations before the first generation choose them."""
