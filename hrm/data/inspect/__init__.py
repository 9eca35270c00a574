"""Inspection of a data set: invariants, rules, pictures."""
