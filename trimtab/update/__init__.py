"""Losses to weights: one subclass of transformers.Trainer, exact microbatching, checkpoint state."""
