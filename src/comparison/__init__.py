"""Compare many runs."""
