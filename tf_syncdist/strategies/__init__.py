"""Strategies for `with strategy.scope():`."""
