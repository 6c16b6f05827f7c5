"""The LDA teacher: a query is weighed over N heads, and their answers or maps are blended.

Letters of document 001: N heads, d the width of a query, m the width of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from core.errors import DataInvalid
from core.tensors.lda import LDA, check_ids, check_lda, load_lda, save_lda, without_questions
from core.tensors.lda_db import load_lda_db, save_lda_db
from core.tensors.manifests import check_temperature
from core.tensors.sqlite_tables import MAGIC

BLOCK_ENTRIES = 16 * 2**20
"""Weighted copies of queries, [B, N, d], in memory at a time (64 MiB in float32); at least one
query's, N d."""


class MultiHeadLDA(nn.Module):
    """A frozen teacher of N heads (documents 001 and 003).

    The weights are w = softmax(q_hat C_hat^T / temperature), hats being unit length. Answers:
    w A, or with maps sum_c w_c q W_c. The scale of a query changes no weight, a zero query weighs
    all heads alike (its direction says nothing), and NaN in a query is NaN in its answer alone.
    """

    centroids: Tensor
    """C, [N, d], as given."""
    directions: Tensor
    """C_hat, [N, d], of length 1."""
    answers: Tensor | None
    """A, [N, m]."""
    maps: Tensor | None
    """W, [N, d, m]."""

    def __init__(
        self,
        centroids: Tensor,
        answers: Tensor | None = None,
        *,
        maps: Tensor | None = None,
        temperature: float,
        cluster_ids: Sequence[str] | None = None,
    ) -> None:
        """Take copies of the heads; all become buffers, of their own dtype and device.

        Args:
            centroids: [N, d] floating, no zero row.
            answers: [N, m], the answer vector of each head.
            maps: [N, d, m], a linear map of each head; exactly one of the two.
            temperature: > 0, in units of a cosine.
            cluster_ids: [N] what the heads are called; their numbers where left out.

        Raises:
            DataInvalid: names the field, what it is and what is needed.
        """
        super().__init__()
        _check(centroids, answers, maps)
        self.temperature = check_temperature(temperature)
        heads = len(centroids)
        self.cluster_ids = [*map(str, range(heads))] if cluster_ids is None else [*cluster_ids]
        check_ids(self.cluster_ids, heads=heads)
        self.register_buffer("centroids", centroids.detach().clone())
        self.register_buffer("directions", unit(centroids.detach().double()).to(centroids))
        self.register_buffer("answers", None if answers is None else answers.detach().clone())
        self.register_buffer("maps", None if maps is None else maps.detach().clone())

    @property
    def num_heads(self) -> int:
        """Return N."""
        return len(self.centroids)

    def weights(self, queries: Tensor) -> Tensor:
        """Weigh the heads.

        Args:
            queries: [B, d] or [d], any length, finite.

        Returns:
            [B, N] or [N], dtype of the buffers; each row sums to 1. Softmax in float32 at least.
        """
        _check_width(queries, self.centroids.shape[1])
        cosines = unit(queries.to(self.centroids)) @ self.directions.T  # [B, N]
        wide = torch.promote_types(cosines.dtype, torch.float32)
        weights: Tensor = (cosines.to(wide) / self.temperature).softmax(dim=-1)
        return weights.to(cosines.dtype)

    def forward(self, queries: Tensor) -> Tensor:
        """Answer the queries: [B, d] to [B, m], or [d] to [m]; dtype of the buffers."""
        weights = self.weights(queries)
        if self.answers is not None:
            return weights @ self.answers
        rows = queries.to(self.centroids).reshape(-1, self.centroids.shape[1])
        mapped = self._mapped(rows, weights.reshape(-1, self.num_heads))
        return mapped.reshape(*queries.shape[:-1], mapped.shape[1])

    def _mapped(self, queries: Tensor, weights: Tensor) -> Tensor:
        """Return sum_c w_c q W_c as one product, (w_c q_i)_ci with W as [N d, m], per block."""
        assert self.maps is not None
        heads, dim, width = self.maps.shape
        stacked = self.maps.reshape(heads * dim, width)
        rows = max(1, BLOCK_ENTRIES // (heads * dim))
        blocks = [
            (w[:, :, None] * q[:, None, :]).reshape(len(q), heads * dim) @ stacked
            for q, w in zip(queries.split(rows), weights.split(rows), strict=True)
        ]
        return torch.cat(blocks)

    @classmethod
    def of(cls, model: LDA) -> Self:
        """Take the heads of a stored model, checked; on the CPU, float32."""
        check_lda(model)
        return cls(
            torch.from_numpy(model.centroids),
            None if model.answers is None else torch.from_numpy(model.answers),
            maps=None if model.maps is None else torch.from_numpy(model.maps),
            temperature=model.temperature,
            cluster_ids=model.cluster_ids,
        )

    @classmethod
    def load(cls, path: str | Path, projection: str | None = None) -> Self:
        """Read the heads from an lda_model .safetensors or an SQLite lda.db, told by its bytes.

        Nothing in the file is executed. Its training questions are not kept: for those read it
        with ``load_lda`` or ``load_lda_db``.

        Args:
            path: of the file.
            projection: of an lda.db; None takes the newest. A .safetensors holds one model.

        Raises:
            DataInvalid: neither of the two, damaged, or no such projection (names those there).
            OSError: there is no such file, or it cannot be read.
        """
        path = Path(path)
        with path.open("rb") as file:
            head = file.read(len(MAGIC))
        if head == MAGIC:
            return cls.of(load_lda_db(path, projection))
        if projection is not None:
            raise DataInvalid(
                f"projection {projection[:60]!r}: a .safetensors holds one model; leave it out"
            )
        return cls.of(load_lda(path))

    def save(self, path: str | Path, *, projection: str = "lda") -> None:
        """Write the heads: as lda.db where ``path`` ends in .db, else as .safetensors.

        ``load`` gives the same heads back, bit for bit. They are stored in float32; where the
        buffers hold more, DataInvalid. ``projection`` is what an lda.db calls them.
        """
        path, model = Path(path), self._stored()
        if path.suffix == ".db":
            save_lda_db(path, {projection: model})
        else:
            save_lda(path, model)

    def _stored(self) -> LDA:
        kept = {"centroids": self.centroids, "answers": self.answers, "maps": self.maps}
        arrays = {}
        for name, tensor in kept.items():
            narrow = None if tensor is None else tensor.float()
            if (
                tensor is not None
                and narrow is not None
                and not torch.equal(narrow.to(tensor), tensor)
            ):
                raise DataInvalid(f"{name}: {tensor.dtype} that float32 cannot hold; call .float()")
            arrays[name] = None if narrow is None else narrow.cpu().numpy()
        centroids = arrays.pop("centroids")
        assert centroids is not None
        manifest = {"temperature": self.temperature}
        return without_questions(
            centroids, **arrays, cluster_ids=self.cluster_ids, manifest=manifest
        )


def unit(vectors: Tensor) -> Tensor:
    """Scale the last axis to length 1; zeros stay zeros, and no square over- or underflows."""
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    scaled = vectors / torch.where(largest > 0, largest, torch.ones_like(largest))
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(length > 0, length, torch.ones_like(length))


def _check(centroids: Tensor, answers: Tensor | None, maps: Tensor | None) -> None:
    if (answers is None) == (maps is None):
        raise DataInvalid("answers, maps: needed exactly one of the two")
    name, heads = ("answers", answers) if maps is None else ("maps", maps)
    for field, given in (("centroids", centroids), (name, heads)):
        if not isinstance(given, Tensor):
            raise DataInvalid(f"{field}: a {type(given).__name__}; needed a tensor")
    assert heads is not None
    if centroids.ndim != 2 or 0 in centroids.shape:
        raise DataInvalid(f"centroids: shape {list(centroids.shape)}; needed [heads, dim]")
    leading = centroids.shape[: heads.ndim - 1]
    if heads.ndim != (2 if maps is None else 3) or heads.shape[:-1] != leading or not heads.numel():
        needed = [*centroids.shape[: 1 if maps is None else 2], "m >= 1"]
        raise DataInvalid(f"{name}: shape {list(heads.shape)}; needed {needed}")
    for field, tensor in (("centroids", centroids), (name, heads)):
        kind = (tensor.dtype, tensor.device)
        if not tensor.is_floating_point() or kind != (centroids.dtype, centroids.device):
            raise DataInvalid(
                f"{field}: {tensor.dtype} on {tensor.device}; needed one floating dtype and device "
                "for all"
            )
        if not bool(tensor.isfinite().all()):
            raise DataInvalid(f"{field}: holds NaN or infinity")
    if not bool(centroids.any(dim=1).all()):
        row = int((~centroids.any(dim=1)).nonzero()[0])
        raise DataInvalid(f"centroids: row {row} is all zeros; a direction is needed")


def _check_width(queries: Tensor, dim: int) -> None:
    if queries.ndim not in (1, 2) or queries.shape[-1] != dim:
        raise DataInvalid(f"queries: shape {list(queries.shape)}; needed [B, {dim}] or [{dim}]")
