"""The LightningModule and what trains it."""
