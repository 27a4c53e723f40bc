"""Evaluate one trained run."""
