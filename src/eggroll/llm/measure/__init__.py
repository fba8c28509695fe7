"""What a model scores on test problems, and how sure that is."""
