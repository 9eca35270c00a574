"""The training run: log, health, signals, resumption."""
