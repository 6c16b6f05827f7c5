"""What may be asked of each stage of a rotation transport (document 002). Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.specs.base import Closed

Stage = Literal["capture", "permute", "rotate", "fold", "evaluate"]
STAGES: tuple[Stage, ...] = ("capture", "permute", "rotate", "fold", "evaluate")
HELD_OUT_SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Of the smaller width, tried where k is ``held_out``."""
TEST_FRACTION = 0.2
Layer = Annotated[int, Field(ge=0, le=4095)]


class Capture(Closed):
    """Which rows of the two residual streams are paired, and how they count."""

    system_prompt: str = Field(
        "", max_length=20_000, description="Stands before every text; its own tokens never count."
    )
    max_tokens: int = Field(
        512, ge=8, le=131_072, description="Of a text with the system prompt; the rest is cut off."
    )
    alignment: Literal["last", "span_average"] = Field(
        "last",
        description="Where tokenizers differ: a student's token takes the teacher's state at the "
        "first token that covers its end, or the document's average over the token's span, which "
        "mixes in prefixes that the student's token has passed.",
    )
    layer_map: Literal["proportional", "cka"] | tuple[Layer, ...] = Field(
        "proportional",
        description="Which layer of the teacher stands beside each of the student's: by depth, by "
        "linear CKA on some texts, or told.",
    )
    token_weights: Literal["token", "text"] = Field(
        "token", description="Whether every token counts alike, or every text."
    )
    drop_bos: bool = Field(
        default=True, description="Leave out the first token, whose state is that of no text."
    )
    drop_massive: float | None = Field(
        20.0,
        gt=1,
        le=1e6,
        description="Leave out tokens whose residual stream, in either model, is more than so many "
        "times as long as the median of its text; null: none.",
    )
    raw: bool = Field(
        default=False,
        description="Also keep the paired states themselves, with a JSON beside each shard.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="What the models compute in; auto: float32 on a CPU, else as stored."
    )
    placement: Literal["device", "spread"] = Field(
        "device",
        description="spread: over all devices that the worker sees, then memory and disk "
        "(accelerate's device_map), for models larger than one device.",
    )
    prompts_per_chunk: int = Field(64, ge=1, le=100_000, description="Each chunk loads the models.")
    batch_tokens: int = Field(4096, ge=16, le=1 << 20, description="Tokens computed at once.")


class Permute(Closed):
    """Heads and SwiGLU neurons are put in the teacher's order before anything is rotated."""

    heads: bool = Field(default=True, description="By attention maps, KV group by KV group.")
    neurons: bool = Field(default=True, description="By the correlation of activations.")
    layers: Literal["all", "every_other"] | tuple[Layer, ...] = Field(
        "all", description="Of the student; statistics are kept for these alone."
    )


class Rotate(Closed):
    """How the map of the student's stream to the teacher's is fitted."""

    tie: Literal["layer", "stage", "global"] = Field(
        "global", description="What shares one rotation; a fold 'global' needs one for all."
    )
    stage_layers: int = Field(8, ge=1, le=4096, description="Layers of a stage.")
    k: Annotated[int, Field(ge=1, le=1 << 20)] | Literal["held_out"] | None = Field(
        None,
        description="Dimensions of the shared subspace; null: shrink times the smaller width; "
        "held_out: of five shares of it, the best on a fifth of the training texts.",
    )
    shrink: float = Field(1.0, ge=0.05, le=1, description="0.8 is the document's cautious choice.")
    pca: Literal["joint", "each"] = Field(
        "joint",
        description="Leading directions of the cross-moment (PLS-SVD), which makes the map the "
        "best of its rank, and what is completed the same for every k; or of either model's own "
        "second moments, as the document has it.",
    )
    centre: bool = Field(
        default=False,
        description="Take the means out of the fit; what is folded turns them all the same.",
    )
    whiten: bool = Field(
        default=False,
        description="The document's z-score before the fit. Undone, its map is no rotation: it is "
        "reported, and cannot be folded.",
    )
    ridge: float = Field(
        1e-3,
        ge=0,
        le=1,
        description="On second moments, of their mean diagonal: bounds the z-scores of channels "
        "that hardly vary. It turns no principal direction; without whiten it tells how many "
        "of the k hold less than it.",
    )
    det: Literal["any", "positive"] = Field(
        "any", description="positive: a square rotation never reflects."
    )

    @model_validator(mode="after")
    def _one_way_to_say_k(self) -> Rotate:
        if self.k is not None and self.shrink != 1.0:
            raise ValueError("shrink beside k: say one of them")
        return self


class Fold(Closed):
    """How rotations go into the weights."""

    variant: Literal["global", "sliced", "conjugate"] = Field(
        "global",
        description="global: one rotation, computes exactly what it did. sliced: one per layer or "
        "stage, exact by skip adapters between them, loads with our module. conjugate: the "
        "document's, block by block without adapters; does not compute what it did.",
    )
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = Field(
        "keep", description="Of the weights written."
    )


class Refine(Closed):
    """Householder reflections in closed form, where a tie, a cut or a sign left something."""

    reflections: int = Field(2, ge=0, le=2, description="At most so many per rotation; 0: none.")


class Evaluate(Closed):
    """What is measured on texts held out by document."""

    variants: tuple[Literal["base", "permuted", "rotated"], ...] = Field(
        ("base", "permuted", "rotated"),
        min_length=1,
        max_length=3,
        description="Each once; with them 'rotated', whose logits tell whether the fold is exact.",
    )
    layers: tuple[Layer, ...] = Field(
        (), max_length=512, description="Whose hidden cosine is shown; empty: all."
    )
    test_fraction: float | None = Field(
        None,
        gt=0,
        lt=0.9,
        description="Of texts without a split, never fitted on; null: 0.2, or what given moments "
        "or states were taken with.",
    )

    @property
    def held_out(self) -> float:
        """The share in force where texts are parted."""
        return TEST_FRACTION if self.test_fraction is None else self.test_fraction

    @model_validator(mode="after")
    def _each_once(self) -> Evaluate:
        if len(set(self.variants)) < len(self.variants):
            raise ValueError("variants: the same one twice; name each once")
        return self


class Gates(Closed):
    """What must hold, or the job fails; its report stays."""

    orthogonality: float = Field(1e-5, gt=0, description="max abs(R R^T - I), and of the core.")
    round_trip: float = Field(1e-5, gt=0, description="max abs(x R R^T - x) of random rows.")
    unfold: float = Field(
        1e-6, gt=0, description="Unfolded weights against the old, relative, before rounding."
    )
    logits: float = Field(
        1e-3,
        gt=0,
        description="Of an exact fold: largest change of a logit over the largest logit; times 64 "
        "where weights are of 16 bits, or capture.dtype is: rounding costs about 2^-9 in every "
        "block.",
    )
    improves: bool = Field(
        default=True,
        description="Held-out cosine after the rotation must be above that before it and above "
        "both nulls (shuffled pairs, the mean alone), over all sites.",
    )
    hidden_cosine: float | None = Field(
        None,
        gt=-1,
        le=1,
        description="Held-out mean cosine to be reached, 0.75 in the document; null: reported.",
    )
    rms_ratio: float | None = Field(
        None,
        gt=1,
        description="Most that a channel's RMS may differ from the teacher's, as a factor, in the "
        "median; null: reported.",
    )
