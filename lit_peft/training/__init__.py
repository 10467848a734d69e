"""Training: the LightningModule that methods are mixed into, its optimizer, randomness, checkpoints and strategies."""
