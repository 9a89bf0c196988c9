"""trimtab: align language models with human feedback, every published way, honestly compared."""

__version__ = "0.1.0"
