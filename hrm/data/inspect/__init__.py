"""A data set looked at: invariants, rules, pictures."""
