"""Quality and speed of any checkpoint: suites, statistics, likelihood, reports."""
