"""The LightningModule, and its training."""
