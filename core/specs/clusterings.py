"""How queries are grouped into clusters before one rotation is fitted to each."""

from typing import Annotated, Literal

from pydantic import Field

from core.specs.base import Closed

MinSize = Annotated[int, Field(ge=1, le=1_000_000)]


class KMeans(Closed):
    """Lloyd's k-means on the target vectors, k-means++ start."""

    method: Literal["kmeans"] = "kmeans"
    max_clusters: int = Field(64, ge=1, le=4096)
    min_cluster_size: MinSize = 8
    """Smaller clusters are merged into the nearest one that is large enough."""


class Mst(Closed):
    """Cut the longest edges of the targets' minimum spanning tree (cosine distance)."""

    method: Literal["mst"] = "mst"
    max_clusters: int = Field(64, ge=1, le=4096)
    min_cluster_size: MinSize = 8
    """A cut that would leave a smaller part is not made."""


class Groups(Closed):
    """The ``groups`` column of the pairs: one cluster per label."""

    method: Literal["groups"] = "groups"
    min_cluster_size: MinSize = 1
    """Smaller groups are merged into the nearest one that is large enough."""


Clustering = Annotated[KMeans | Mst | Groups, Field(discriminator="method")]
