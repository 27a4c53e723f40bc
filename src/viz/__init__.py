"""Image grids, plots and tables."""
