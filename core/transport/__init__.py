"""ALGORITHMS: rotation transport of language models (document 002): tensors in, tensors out."""
