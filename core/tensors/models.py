"""Whatever a teacher may be over: reads a stored model by the format its manifest tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from core.errors import DataInvalid
from core.tensors import shards
from core.tensors.embeddings import Embeddings, load_embeddings
from core.tensors.formats import Federated, load_federated
from core.tensors.lda import LDA, load_lda
from core.tensors.manifests import shown

Model = Federated | LDA | Embeddings
_LOADERS: Mapping[str, Callable[[Path], Model]] = {
    "federated_model": load_federated,
    "lda_model": load_lda,
    "embeddings": load_embeddings,
}


def load_model(path: Path) -> Model:
    """Read a model of any format; DataInvalid where it is none."""
    told = shards.load_manifest(path).get("format")
    if told not in _LOADERS:
        raise DataInvalid(f"manifest: format {shown(told)}; allowed: {', '.join(_LOADERS)}")
    return _LOADERS[str(told)](path)
