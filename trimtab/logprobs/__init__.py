"""(model, tokens) -> per-token log-probabilities. Prefix sharing, chunking, packing and caching live here only."""
