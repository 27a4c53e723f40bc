"""Resolve, build and open runs."""
