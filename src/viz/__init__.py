"""Image grids, charts and tables."""
