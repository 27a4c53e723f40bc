"""Datasets and LightningDataModules. Independent of the mathematics and the networks."""

PATH_KEYS = (
    *("data.root", "data.val_root", "data.path", "data.name", "data.urls", "data.val_urls"),
    *("data.source.labels", "data.source.captions", "init_from.path", "autoencoder.path", "repa.encoder"),
)
"""Settings of files that a run only reads."""
