"""Comparison of runs: campaigns, statistics, plots and pages."""
