"""How queries are grouped into clusters before one rotation is fitted to each."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from core.errors import SpecInvalid
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


def most_clusters(clustering: Clustering, pairs: Mapping[str, Any]) -> int:
    """Return how many clusters pairs of this meta come to at most.

    Raises:
        SpecInvalid: they are to be clustered by their groups, and have none.
    """
    if not isinstance(clustering, Groups):
        most = clustering.max_clusters
    elif not (most := pairs["groups"]):
        raise SpecInvalid(
            "clustering 'groups' needs a groups column, and these pairs have none; "
            "allowed for them: kmeans, mst",
            pointer="/clustering/method",
        )
    return min(most, int(pairs["rows"]))
