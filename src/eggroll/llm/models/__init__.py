"""Language models on disk and in memory: finding, loading, counting, saving."""
