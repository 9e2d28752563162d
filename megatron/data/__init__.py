"""From token files to samples: formats, sample order, loading, tokenizers, checks."""
