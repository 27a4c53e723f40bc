"""Datasets and LightningDataModules. They know neither the mathematics nor the networks."""
