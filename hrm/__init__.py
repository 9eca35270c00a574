"""Hierarchical reasoning models: the model, its training step, its data and its commands."""

from hrm.common.threads import configure

configure()
