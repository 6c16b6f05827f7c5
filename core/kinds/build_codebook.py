"""Make a codebook of rotation planes from a federated model, in both its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from core.errors import SpecInvalid
from core.kinds._base import Chunk, ChunkResult, Input, Kind, Metric, Produced, Stage
from core.kinds._files import blocks, float_bytes
from core.kinds._teacher import CLUSTERS_PER_BLOCK, bivector_block
from core.specs.base import JobSpec, Reads, Reference
from core.specs.codebooks import (
    MOST_PLANES,
    CanonicalPlanes,
    Codebook,
    CombinedPlanes,
    PrincipalPlanes,
)
from core.specs.teachers import Rotational

if TYPE_CHECKING:
    from torch import Tensor

    from core.tensors.codebooks import Codebook as Planes


class Spec(JobSpec):
    """Of which model, and which planes."""

    kind: Literal["build_codebook"] = "build_codebook"
    model: Annotated[Reference, Reads("federated_model")] = Field(
        description="Whose clusters' rotations the planes are made of."
    )
    codebook: Codebook = PrincipalPlanes()
    with_codebooks: tuple[Annotated[Reference, Reads("codebook")], ...] = Field(
        (),
        max_length=64,
        description="Other models' codebooks of the same width, each of which weighs as much as "
        "this model; only with method 'combined'.",
    )
    compat: Literal["legacy"] | None = Field(
        None, description="'legacy' takes log W as document 000 does, not log(G^T W)."
    )

    @model_validator(mode="after")
    def _only_combined_joins_others(self) -> Spec:
        if self.with_codebooks and not isinstance(self.codebook, CombinedPlanes):
            raise ValueError(
                f"with_codebooks beside codebook.method '{self.codebook.method}': leave it empty, "
                "or take method 'combined'"
            )
        if len(set(self.with_codebooks)) < len(self.with_codebooks):
            raise ValueError("with_codebooks: the same one twice; name each once")
        if self.compat is not None and self.codebook.method == "canonical":
            raise ValueError(
                "compat 'legacy' beside codebook.method 'canonical': made from nothing, whatever "
                "the logarithms; leave it null"
            )
        return self


def stages(spec: Spec, inputs: Mapping[str, Input]) -> Sequence[Stage]:
    """Logarithms fanned over clusters, the clusters' own planes where combined, then one build."""
    model = inputs["model"].meta
    clusters, dim = model["clusters"], model["dim"]
    spec.codebook.check_width(dim)
    others = [inputs[name] for name in _others(spec)]
    _check_others(others, dim, spec.compat)
    several = len(blocks(clusters, CLUSTERS_PER_BLOCK))
    block = float_bytes(clusters + 6 * CLUSTERS_PER_BLOCK, dim, dim)
    return [
        Stage(
            "bivectors",
            0 if isinstance(spec.codebook, CanonicalPlanes) else several,
            memory_bytes=block,
        ),
        Stage(
            "planes",
            several if isinstance(spec.codebook, CombinedPlanes) else 0,
            memory_bytes=float_bytes(6 * CLUSTERS_PER_BLOCK, dim, dim),
        ),
        Stage("build", 1, memory_bytes=_build_bytes(spec.codebook, clusters, dim, others)),
    ]


def _others(spec: Spec) -> list[str]:
    """Name the inputs that are other models' codebooks."""
    return [f"with_codebooks.{number}" for number in range(len(spec.with_codebooks))]


def _check_others(others: Sequence[Input], dim: int, compat: str | None) -> None:
    """Refuse codebooks that cannot be joined to the model's, or bring too many planes."""
    seen: set[str] = set()
    for number, other in enumerate(others):
        made, odd = other.meta, ""
        if made["dim"] != dim:
            odd = f"has {made['dim']} dimensions, the model {dim}"
        elif not made.get("explains", True):
            odd = (
                "says of no plane that it explains anything, as canonical ones do not; give one "
                "that was made from a model"
            )
        elif made.get("compat", compat) != compat:
            told = "log W" if compat is None else "log(G^T W)"
            odd = f"is made of {told}, this one would not be: say the same compat"
        elif other.sha256 in seen:
            odd = "has the content of one before it; name each once"
        if odd:
            pointer = f"/with_codebooks/{number}"
            raise SpecInvalid(f"with_codebooks: number {number + 1} {odd}", pointer=pointer)
        seen.add(other.sha256)
    brought = sum(other.meta["n_components"] for other in others)
    if brought > MOST_PLANES:
        raise SpecInvalid(
            f"with_codebooks: {brought} planes in all; allowed: 1 to {MOST_PLANES}",
            pointer="/with_codebooks",
        )


def _build_bytes(codebook: Codebook, clusters: int, dim: int, others: Sequence[Input]) -> int:
    """What the build holds: see ``principal_components``, and the components beside it."""
    if isinstance(codebook, CanonicalPlanes):
        return float_bytes(2, dim, dim)
    components = float_bytes(codebook.n_components + CLUSTERS_PER_BLOCK, dim, dim)
    if isinstance(codebook, PrincipalPlanes) and codebook.solver != "incremental":
        return 2 * components + 2 * float_bytes(clusters, dim, dim)
    if isinstance(codebook, CombinedPlanes):
        own = clusters * codebook.brought(clusters, dim)
        planes = own + sum(other.meta["n_components"] for other in others)
        return 3 * components + 8 * float_bytes(planes, planes)  # four matrices of float64
    return 3 * components


def run_chunk(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Run one chunk of whichever stage."""
    steps = {"bivectors": _bivectors, "planes": _planes, "build": _build}
    return steps[chunk.stage](spec, chunk)


def _bivectors(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.tensors.formats import load_federated

    model = load_federated(chunk.fetch(chunk.input("model").sha256))
    start, stop = blocks(len(model.rotations), CLUSTERS_PER_BLOCK)[chunk.index]
    chunk.progress(0, 1)
    teacher = Rotational(compat=spec.compat)
    return ChunkResult(
        checkpoints={"bivectors": bivector_block(chunk, model, teacher, start, stop)}
    )


def _read_blocks(chunk: Chunk) -> Iterator[Tensor]:
    """Yield the bivectors block by block; only one is held here."""
    import torch

    from core.tensors import shards

    made = chunk.outputs("bivectors")
    for index, block in enumerate(made):
        chunk.progress(index, len(made))
        yield torch.from_numpy(shards.load(block["bivectors"].path)[0]["bivectors"])


def _planes(spec: Spec, chunk: Chunk) -> ChunkResult:
    """Find the leading planes of a block's clusters, each for itself."""
    import numpy as np
    import torch

    from core.rotations.codebook import clusters_own
    from core.tensors import shards

    assert isinstance(spec.codebook, CombinedPlanes)
    path = chunk.outputs("bivectors")[chunk.index]["bivectors"].path
    bivectors = torch.from_numpy(shards.load(path)[0]["bivectors"])
    clusters, d, _ = bivectors.shape
    count = spec.codebook.brought(chunk.input("model").meta["clusters"], d)
    planes = np.zeros((clusters, count, 2, d), np.float32)
    explained = np.zeros((clusters, count), np.float32)
    for index, bivector in enumerate(bivectors):
        chunk.progress(index, clusters)
        (own,) = clusters_own(bivector[None], count)
        if own is not None:
            planes[index], explained[index] = own.planes, own.explained
    squares = bivectors.double().square().sum((1, 2)).numpy()
    target = chunk.workdir / "planes.safetensors"
    tensors = {"planes": planes, "explained": explained, "squares": squares}
    shards.save(target, tensors, {"format": "cluster_planes", "version": 1})
    return ChunkResult(
        checkpoints={"planes": Produced(target, "cluster_planes", target.name)},
    )


def _build(spec: Spec, chunk: Chunk) -> ChunkResult:
    from core.distill.report import draw_explained
    from core.tensors.codebooks import save_codebook, save_codebook_npz

    chunk.progress(0, 1)
    codebook = _codebook(spec, chunk)
    folder = chunk.workdir
    paths = {
        "codebook": folder / "codebook.safetensors",
        "codebook_npz": folder / "codebook.npz",
        "explained": folder / "explained.png",
    }
    save_codebook(paths["codebook"], codebook)
    save_codebook_npz(paths["codebook_npz"], codebook)
    together = float(codebook.facts.get("together", 0.0))
    draw_explained(paths["explained"], codebook.explained.tolist(), together=together)
    outputs = {
        "codebook": Produced(
            paths["codebook"], "codebook", "codebook.safetensors", meta=codebook.meta()
        ),
        "codebook_npz": Produced(
            paths["codebook_npz"], "codebook_npz", "codebook.npz", meta=codebook.meta()
        ),
        "explained": Produced(paths["explained"], "picture", "explained.png", "image/png"),
    }
    return ChunkResult(outputs=outputs, metrics=[Metric("explained_together", 0, together)])


def _codebook(spec: Spec, chunk: Chunk) -> Planes:
    """Make the codebook, and note what it was made of."""
    from core.rotations.codebook import canonical, pca
    from core.tensors.codebooks import Codebook as Made

    asked, model = spec.codebook, chunk.input("model")
    if isinstance(asked, CanonicalPlanes):
        return canonical(model.meta["dim"], asked.n_components)
    if isinstance(asked, PrincipalPlanes):
        made = pca(
            lambda: _read_blocks(chunk),
            asked.n_components,
            weights=_sizes(chunk),
            solver=asked.solver,
            disjoint=asked.disjoint,
            seed=spec.seed,
        )
    else:
        made = _combined(spec, chunk, asked)
    facts = {**made.facts, "model": model.sha256, "compat": spec.compat}
    return Made(made.planes, made.explained, made.method, facts)


def _combined(spec: Spec, chunk: Chunk, asked: CombinedPlanes) -> Planes:
    import numpy as np
    import torch

    from core.rotations.codebook import combine_clusters
    from core.tensors import shards
    from core.tensors.codebooks import Codebook as Made
    from core.tensors.codebooks import load_codebook

    own: list[Planes | None] = []
    squares: list[float] = []
    for block in chunk.outputs("planes"):
        found = shards.load(block["planes"].path)[0]
        squares += found["squares"].tolist()
        own += [
            Made(planes, explained, "pca") if explained.any() else None
            for planes, explained in zip(found["planes"], found["explained"], strict=True)
        ]
    sizes = _sizes(chunk).double()
    turning = sizes / sizes.sum() * torch.from_numpy(np.array(squares))
    joined = [chunk.input(name).sha256 for name in _others(spec)]
    others = [load_codebook(chunk.fetch(sha256)) for sha256 in joined]
    made = combine_clusters(own, turning, asked, others=others)
    facts = {**made.facts, "codebooks": joined} if joined else made.facts
    return Made(made.planes, made.explained, made.method, facts)


def _sizes(chunk: Chunk) -> Tensor:
    """[C]: the clusters' training queries, by which they weigh."""
    import numpy as np
    import torch

    from core.tensors import shards

    path = chunk.fetch(chunk.input("model").sha256)
    meta: Mapping[str, Any] = chunk.input("model").meta
    cluster_of = shards.load_rows(path, "cluster_of", 0, meta["rows"])
    return torch.from_numpy(np.bincount(cluster_of, minlength=meta["clusters"]))


KIND = Kind(
    spec=Spec,
    stages=stages,
    run_chunk=run_chunk,
    summary="Make a codebook of rotation planes from a federated model.",
    example={
        "kind": "build_codebook",
        "model": "0" * 64,
        "codebook": {"method": "pca", "n_components": 64},
    },
    outputs={"codebook": "codebook", "codebook_npz": "codebook_npz", "explained": "picture"},
)
