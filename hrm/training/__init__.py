"""A run around the step: log, health, signals, resumption."""
