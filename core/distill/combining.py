"""Puts several federated models side by side: every cluster kept, nothing averaged."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from core.distill.teachers._federated import TOP_K
from core.errors import DataInvalid
from core.rotations.procrustes import procrustes_from_moment
from core.tensors.formats import Federated
from core.tensors.shards import Array


def combine(models: Mapping[str, Federated]) -> Federated:
    """Return one model with the clusters and training queries of all, in the order given.

    Its manifest names the ``sources``, by which the teacher ``multi_source`` routes inside each.
    Other teachers see one model: they route over all training queries at the mean temperature.
    The anchor is the rotation nearest to the sources' anchors, weighed by their clusters.

    Args:
        models: SHA-256 -> model, at least one, all of one width; none combined itself.

    Raises:
        DataInvalid: the widths differ, or a model is itself a combination.
    """
    widths = {name: model.rotations.shape[1] for name, model in models.items()}
    if len(set(widths.values())) > 1:
        shown = ", ".join(f"{name[:12]}… {width}" for name, width in widths.items())
        raise DataInvalid(f"models: widths differ ({shown}); needed one and the same")
    for name, model in models.items():
        if "sources" in model.manifest:
            raise DataInvalid(
                f"models: {name[:12]}… is itself a combination; name its sources instead"
            )
    parts = list(models.values())
    starts = np.cumsum([0, *(len(model.rotations) for model in parts)])
    clusters = [model.cluster_of + start for model, start in zip(parts, starts[:-1], strict=True)]
    rows = sum(len(model.queries) for model in parts)
    temperatures = [float(model.manifest["temperature"]) for model in parts]
    manifest = {
        "temperature": float(np.mean(temperatures)),
        "pairs": None,
        "sources": [_source(name, model) for name, model in models.items()],
    }
    return Federated(
        rotations=_joined(parts, "rotations"),
        scales=_joined(parts, "scales"),
        anchor=_mean_rotation(parts),
        centroids=_joined(parts, "centroids"),
        queries=_joined(parts, "queries"),
        targets=_joined(parts, "targets"),
        cluster_of=np.concatenate(clusters),
        train_rows=np.arange(rows),
        held_out_rows=np.zeros(0, dtype=np.int64),
        manifest=manifest,
    )


def _source(name: str, model: Federated) -> dict[str, object]:
    return {
        "model": name,
        "clusters": len(model.rotations),
        "rows": len(model.queries),
        "temperature": float(model.manifest["temperature"]),
        "top_k": model.manifest.get("top_k", TOP_K),
    }


def _joined(models: list[Federated], field: str) -> Array:
    joined: Array = np.concatenate([getattr(model, field) for model in models])
    return joined


def _mean_rotation(models: list[Federated]) -> Array:
    """Return the rotation nearest to the weighed sum of the anchors (chordal mean), float32."""
    first = models[0].anchor
    if all(np.array_equal(model.anchor, first) for model in models):
        return first
    total = sum(len(model.rotations) * model.anchor.astype(np.float64) for model in models)
    nearest: Array = procrustes_from_moment(torch.from_numpy(np.asarray(total))).float().numpy()
    return nearest
