"""Datasets and LightningDataModules. Independent of the mathematics and the networks."""
