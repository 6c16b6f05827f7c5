"""Families of language models as data: which axis of which weight is which stream. Torch-free."""
