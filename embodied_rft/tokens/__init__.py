"""Large decoders: shared prefixes, sampling, log-probabilities, micro-batches by cost."""
