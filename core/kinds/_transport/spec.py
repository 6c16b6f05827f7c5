"""What a transport may be asked for. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.specs.base import JobSpec, Reads, Reference
from core.specs.transport import (
    STAGES,
    Capture,
    Evaluate,
    Fold,
    Gates,
    Permute,
    Refine,
    Rotate,
)
from core.specs.transport import Stage as StageName


class Spec(JobSpec):
    """Which student is brought into which teacher's basis, over which texts, and how far."""

    kind: Literal["transport"] = "transport"
    student: Annotated[Reference, Reads("language_model")] = Field(
        description="The model that is turned."
    )
    teacher: Annotated[Reference, Reads("language_model")] = Field(
        description="The model whose basis is taken."
    )
    prompts: Annotated[Reference, Reads("prompts")] = Field(
        description="Texts of the domain; those of split 'test' are held out."
    )
    until: StageName = Field("evaluate", description="The last stage that runs.")
    moments: Annotated[Reference, Reads("moments")] | None = Field(
        None, description="Of an earlier transport over the same models and texts: no capture."
    )
    states: Annotated[Reference, Reads("states")] | None = Field(
        None, description="Raw states kept by an earlier capture: moments are taken from them."
    )
    permutations: Annotated[Reference, Reads("permutations")] | None = Field(
        None, description="Given, none are looked for."
    )
    rotations: Annotated[Reference, Reads("rotations")] | None = Field(
        None, description="Given, none are fitted."
    )
    folded: Annotated[Reference, Reads("language_model")] | None = Field(
        None, description="An already folded student: it is evaluated alone."
    )
    capture: Capture | None = Field(
        None, description="null: the defaults, or what given moments or states were taken by."
    )
    permute: Permute | None = Field(
        None,
        description="null: heads and neurons of all layers, but none beside permutations, "
        "rotations or states; nothing with both set to false.",
    )
    rotate: Rotate = Rotate()
    refine: Refine = Refine()
    fold: Fold = Fold()
    evaluate: Evaluate = Evaluate()
    gates: Gates = Gates()

    @model_validator(mode="after")
    def _parts_fit(self) -> Spec:
        _check_fold(self)
        _check_given(self)
        _check_unread(self)
        _check_judged(self)
        return self

    def runs(self, stage: StageName) -> bool:
        """Tell whether a stage is within ``until``."""
        return STAGES.index(stage) <= STAGES.index(self.until)


def _check_fold(spec: Spec) -> None:
    if not spec.runs("fold"):
        return
    if spec.fold.variant == "global" and spec.rotate.tie != "global":
        raise ValueError(
            f"fold.variant 'global' beside rotate.tie {spec.rotate.tie!r}: one rotation goes "
            "through the whole stream; allowed: tie 'global', or fold.variant 'sliced'"
        )
    if spec.rotate.whiten:
        raise ValueError(
            "rotate.whiten beside until 'fold' or later: undone, a whitened map is no rotation; "
            "allowed: whiten false, or until 'rotate' to see it reported"
        )


def _check_judged(spec: Spec) -> None:
    """Refuse to offer what is not looked at, and a bound on what nothing that runs measures."""
    if spec.runs("evaluate") and "rotated" in spec.evaluate.variants:
        return
    if spec.runs("evaluate"):
        raise ValueError(
            "evaluate.variants without 'rotated': whether the fold left the logits unchanged would "
            "not be seen; needed 'rotated' among them"
        )
    for name in ("hidden_cosine", "rms_ratio"):
        if getattr(spec.gates, name) is not None:
            raise ValueError(
                f"gates.{name} is measured on the rotated student; needed until 'evaluate'"
            )


def _check_unread(spec: Spec) -> None:
    """Refuse what is said of stages whose results are given."""
    for given, names in {"rotations": ("rotate", "refine"), "folded": ("fold",)}.items():
        for name in names:
            asked = getattr(spec, name)
            if getattr(spec, given) is not None and asked != type(asked)():
                raise ValueError(f"{name} beside {given}: those are given; leave {name} out")
    raw = spec.capture is not None and spec.capture.raw
    for name in ("moments", "states", "rotations"):
        if raw and getattr(spec, name) is not None:
            raise ValueError(f"capture.raw beside {name}: nothing is captured; leave it false")
    if spec.rotate.k != "held_out":
        return
    if raw:
        raise ValueError(
            "capture.raw beside rotate.k 'held_out': states of the texts that choose k are not "
            "kept; allowed: a number or null"
        )
    if spec.rotate.pca == "joint":
        raise ValueError(
            "rotate.k 'held_out' beside rotate.pca 'joint': the whole rotation is the same for "
            "every k there, so none is better; allowed: pca 'each'"
        )


def _check_given(spec: Spec) -> None:
    given = {
        "moments": spec.moments,
        "states": spec.states,
        "permutations": spec.permutations,
        "rotations": spec.rotations,
        "folded": spec.folded,
    }
    last: Mapping[str, StageName] = {
        "moments": "permute",
        "states": "capture",
        "permutations": "fold",
        "rotations": "fold",
        "folded": "evaluate",
    }
    for name, value in given.items():
        if value is not None and not spec.runs(last[name]):
            raise ValueError(f"{name} beside until {spec.until!r}: nothing that runs reads it")
    if spec.moments is not None and spec.states is not None:
        raise ValueError("moments beside states: give one of them")
    if spec.permutations is not None and spec.permute is not None:
        raise ValueError("permute beside permutations: those are given; leave permute out")
    if spec.rotations is not None and spec.permute is not None:
        raise ValueError(
            "permute beside rotations: orders are looked for in moments; give permutations, or "
            "leave permute out"
        )
    if spec.states is not None and spec.rotate.k == "held_out":
        raise ValueError(
            "rotate.k 'held_out' beside states: which texts were to choose it is lost in the sums; "
            "allowed: a number or null"
        )
    if spec.states is not None and spec.permute is not None:
        raise ValueError(
            "permute beside states: kept states are of the stream alone, not of heads and neurons; "
            "leave permute out"
        )
    if spec.folded is not None and spec.rotations is None:
        raise ValueError("folded without rotations: give those it was folded with")
