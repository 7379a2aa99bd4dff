"""Saved models: checkpoints, folders with model cards, and checkpoints that the authors released."""
