"""What a run needs in memory and what its generations cost, known before it is started."""
