"""The module that document 001 imports for its teacher."""

from core.distill.lda import MultiHeadLDA

__all__ = ["MultiHeadLDA"]
