"""What one chunk of a transport reads: models as folders, texts as pairs, what is known so far."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from core.kinds._base import Chunk, Produced
from core.kinds._files import read_json
from core.kinds._transport.plan import Plan
from core.kinds._transport.spec import Spec
from core.specs.base import references_of
from core.specs.transport import Capture

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from core.tensors.language_models import LanguageModel
    from core.tensors.prompts import Prompts
    from core.transport.held_out import HeldOut
    from core.transport.ledger import Side
    from core.transport.pairs import Pair
    from core.transport.permutations import LayerPermutation
    from core.transport.rotations import RotationSet


class Given:
    """Inputs and results of earlier stages, read when asked for."""

    def __init__(self, spec: Spec, chunk: Chunk) -> None:
        self.spec, self.chunk = spec, chunk
        self.plan = Plan(spec, {name: chunk.input(name) for name in references_of(spec)})

    @cached_property
    def capture(self) -> Capture:
        """The options in force: those frozen, or no text longer than what both models read.

        Raises:
            DataInvalid: texts, models or options are not those of the given moments or states.
        """
        asked = self.plan.capture.model_copy(update={"max_tokens": self.plan.max_tokens})
        if not self.plan.frozen:
            return asked
        from core.transport.ledger import BOUND, check

        told = self.spec.capture is not None
        sources = {f"{name}_sha256": self.sources[name] for name in ("student", "teacher")}
        check(self.ledger, self.prompts, capture=asked if told else None, **sources)
        frozen = {name: self.ledger["capture"][name] for name in BOUND}
        return Capture.model_validate({**asked.model_dump(), **frozen})

    def language_model(self, name: str) -> LanguageModel:
        """Read the artifact ``student``, ``teacher`` or ``folded``."""
        return self.model_of(self.chunk.input(name).sha256)

    def model_of(self, sha256: str) -> LanguageModel:
        """Read a model's list of files."""
        from core.tensors.language_models import load_language_model

        return load_language_model(self.chunk.fetch(sha256))

    def folder(self, name: str) -> Path:
        """Return a folder that transformers loads, made once in the chunk's own."""
        return self.folder_of(self.language_model(name), name)

    def folder_of(self, model: LanguageModel, name: str) -> Path:
        """Return the folder of a model under this name."""
        from core.tensors.language_models import lay_out

        folder = self.chunk.workdir / f"model_{name}"
        return folder if folder.exists() else lay_out(model, folder, self.chunk.fetch)

    def load(self, folder: Path, *, maps: bool = False) -> PreTrainedModel:
        """Load a folder's model on this chunk's device, as ``capture`` says."""
        from core.transport.loading import load_model

        return load_model(
            folder,
            device=self.device,
            dtype=self.capture.dtype,
            placement=self.plan.capture.placement,
            maps=maps,
            offload=self.chunk.workdir / "offload",
        )

    @property
    def device(self) -> torch.device:
        """Where this chunk computes."""
        import torch

        return torch.device(self.chunk.device)

    @cached_property
    def prompts(self) -> Prompts:
        """The texts."""
        from core.tensors.prompts import load_prompts

        return load_prompts(self.chunk.fetch(self.chunk.input("prompts").sha256))

    @cached_property
    def sides(self) -> tuple[Side, Side]:
        """Student and teacher, with what cuts text for them."""
        return self._side("student"), self._side("teacher")

    def _side(self, name: str) -> Side:
        from core.transport.ledger import Side
        from core.transport.tokens import load_tokenizer

        tokenizer = load_tokenizer(self.folder(name))
        return Side(self.language_model(name), self.chunk.input(name).sha256, tokenizer)

    @property
    def held_out(self) -> HeldOut:
        """How texts without a split are drawn."""
        from core.transport.held_out import HeldOut

        return HeldOut(self.spec.evaluate.held_out, self.spec.seed)

    def pairs(self, rows: Sequence[int]) -> list[Pair]:
        """Cut texts, by their rows, with both tokenizers, and align them."""
        from core.transport.ledger import read

        student, teacher = self.sides
        return [read(self.prompts, row, student, teacher, self.capture) for row in rows]

    @cached_property
    def moments_list(self) -> Mapping[str, Any]:
        """The artifact ``moments``: its ledger, and the files of its blocks."""
        if self.spec.moments is not None:
            path = self.chunk.fetch(self.chunk.input("moments").sha256)
        else:
            path = self.chunk.outputs("collect")[0]["moments"].path
        return cast("Mapping[str, Any]", read_json(path))

    @cached_property
    def states_list(self) -> Mapping[str, Any]:
        """The artifact ``states``: its ledger, and the kept shards."""
        path = self.chunk.fetch(self.chunk.input("states").sha256)
        return cast("Mapping[str, Any]", read_json(path))

    @cached_property
    def ledger(self) -> Mapping[str, Any]:
        """What was frozen before anything was computed: here, or with the moments or states."""
        if self.spec.moments is not None:
            return cast("Mapping[str, Any]", self.moments_list["ledger"])
        if self.spec.states is not None:
            return cast("Mapping[str, Any]", self.states_list["ledger"])
        made = self.chunk.outputs("ledger")[0]["ledger"]
        return cast("Mapping[str, Any]", read_json(made.path))

    @cached_property
    def permutations(self) -> Mapping[int, LayerPermutation]:
        """By layer; empty where nothing is permuted."""
        from core.transport.permutations import load_permutations

        made = self.permutations_file
        return {} if made is None else load_permutations(made, self.plan.student)

    @property
    def permutations_file(self) -> Path | None:
        """The artifact ``permutations``, given or made."""
        if self.spec.permutations is not None:
            return self.chunk.fetch(self.chunk.input("permutations").sha256)
        if self.plan.permute is None:
            return None
        return self.chunk.outputs("permute")[0]["permutations"].path

    @cached_property
    def rotations(self) -> RotationSet:
        """The maps of all groups, given or solved."""
        from core.transport.rotation_files import load_rotations

        return load_rotations(self.rotations_file)

    @property
    def rotations_file(self) -> Path:
        """The artifact ``rotations``, given or made."""
        if self.spec.rotations is not None:
            return self.chunk.fetch(self.chunk.input("rotations").sha256)
        return self.chunk.outputs("bind")[0]["rotations"].path

    @property
    def sources(self) -> dict[str, str]:
        """SHA-256 of models and texts, by what they are."""
        return {name: self.chunk.input(name).sha256 for name in ("student", "teacher", "prompts")}

    @property
    def fitted_on(self) -> str:
        """SHA-256 over the hashes of the training texts."""
        from core.transport.ledger import training_rows

        texts = [self.ledger["prompts"][row]["sha256"] for row in training_rows(self.ledger)]
        return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()

    def folded(self, variant: str) -> LanguageModel:
        """Return the student of a variant: the base itself, one made here, or the one given."""
        if variant == "base":
            return self.language_model("student")
        if self.spec.folded is not None:
            return self.language_model("folded")
        from core.tensors.language_models import load_language_model

        return load_language_model(packed(self.chunk)[variant].path)


def packed(chunk: Chunk) -> Mapping[str, Produced]:
    """Return the folded models that this job made, by variant."""
    names = {"model": "rotated", "model_permuted": "permuted"}
    made = chunk.outputs("pack")[0]
    return {names[name]: one for name, one in made.items() if name in names}
