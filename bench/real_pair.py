"""The real pair of checkpoints: how near a rotation brings one to the other on held-out texts.

Two Llamas that were trained apart on stories of one sort: ``stories260k-hf`` (width 64, 512 BPE
tokens) and ``babyllama105-hf`` (width 128, 105 characters). Texts are sampled from both models,
half from each, cut at a word; a fifth of them is held out by document. Rows pair every token of the
student with the teacher's token that has read as far.

Both directions. Cosines at every site: before (zeros in the missing coordinates); of the model
folded by the orders of heads (its neurons differ in number); of the model folded by one rotation
for all layers (exact), and by one a layer (with skip adapters); of the latter in the teacher's own
coordinates, where a student that is wider loses what no rotation can take away; the nulls there
(shuffled pairs, the teacher's mean on training texts alone); what any linear map reaches (least
squares with the ridge); and within the shared subspace of k dimensions.

Letters to word pieces (128 -> 64) the teacher's mean alone comes nearer than any rotation, which
cannot shift: for one thing, a letter in the midst of a piece stands beside a state that has read
all of it. 0.75 is not to be had over the full width; least squares, which may stretch and drop what
a rotation has to keep, says how much of the one stream is in the other at all. Where it can be had
is shown beside: the first checkpoint to itself, turned by a hidden rotation, every matrix disturbed
by noise of a fifth of its spread.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import set_verbosity_error

from bench._report import Figure, options, print_table, verdict
from core.specs.transport import Capture, Permute, Rotate
from core.transport.capture import capture
from core.transport.evaluation import Terms, evaluate_variant
from core.transport.fold_folders import fold_folder
from core.transport.fold_plans import FoldPlan
from core.transport.loading import load_model
from core.transport.moments import Captured, Moments
from core.transport.pairs import Pair, pair
from core.transport.permutations import LayerPermutation
from core.transport.permute import LayerSums, match_layer
from core.transport.predictions import logits_change
from core.transport.rotate import solve
from core.transport.rotations import Rotation
from core.transport.sites import Tie, groups
from core.transport.streams import shape_of
from core.transport.tokens import encode, load_tokenizer

SMALL, LARGE = "stories260k-hf", "babyllama105-hf"
CPU = torch.device("cpu")
TEXTS, SAMPLED_AT_ONCE, CHARACTERS, TEMPERATURE = 240, 60, 230, 0.8
HELD_OUT = 5
"""Every so-manieth text."""
SUBSPACES = (8, 16, 32, 64)
ROTATED = ("rotated, one", "rotated, each")
RIDGE = 1e-3
NOISE = 0.2
HOPED = 0.75
ASKED = Capture(max_tokens=256)
EXACT = 1e-4
"""Largest change of a logit, over the largest, by an exact fold in float32."""


@dataclass(frozen=True)
class Side:
    """A checkpoint of the pair."""

    folder: Path
    model: PreTrainedModel
    tokenizer: Any


@dataclass(frozen=True)
class Found:
    """What one direction came to: cosines by column and site, and what was said beside."""

    columns: Mapping[str, Mapping[str, float | None]]
    overall: Mapping[str, float | None]
    notes: Sequence[str]
    logits: float
    """Largest relative change by an exact fold."""


def main() -> int:
    """Run every direction and print its table."""
    parser = options(__doc__)
    parser.add_argument("--models", type=Path, help="folder of both checkpoints' folders")
    parser.add_argument("--texts", type=Path, help="a text a line, instead of sampled ones")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    set_verbosity_error()
    folder = asked.models or _models()
    if folder is None:
        print("the real checkpoints are not here; say where with --models")
        return int(asked.check)
    with tempfile.TemporaryDirectory(prefix="stillroom-real-pair-") as scratch:
        return run(folder, Path(scratch), asked)


def run(folder: Path, scratch: Path, asked: Any) -> int:
    """Compare, print, judge."""
    small, large = (_side(folder / name) for name in (SMALL, LARGE))
    texts = _given(asked.texts) if asked.texts else sampled((small, large), asked.seed)
    disturbed = _side(_disturbed(small, scratch / "disturbed", asked.seed))
    told = {
        f"{SMALL} -> {LARGE} (64 -> 128)": (small, large),
        f"{LARGE} -> {SMALL} (128 -> 64)": (large, small),
        f"{SMALL} -> itself, turned and disturbed (64 -> 64)": (small, disturbed),
    }
    found = []
    for number, (title, sides) in enumerate(told.items()):
        found.append(compare(*sides, texts, scratch / str(number), seed=asked.seed))
        show(title, found[-1])
    real, planted = found[:2], found[2]
    return verdict(
        "real_pair",
        Figure("cosine above before", min(_gain(one, "before") for one in real), 0.3),
        Figure("above shuffled pairs", min(_gain(one, "shuffled") for one in real), 0.2),
        Figure("above the mean alone, 64 -> 128", _gain(real[0], "mean only"), 0.1),
        Figure("logits of exact folds", max(one.logits for one in found), EXACT, at_most=True),
        Figure("cosine where the widths allow", planted.overall["rotated, one"] or 0.0, HOPED),
        check=asked.check,
    )


def _gain(of: Found, rival: str) -> float:
    return (of.overall["seen"] or 0.0) - (of.overall[rival] or 0.0)


def show(title: str, found: Found) -> None:
    """Print one direction's table."""
    names = list(found.columns)
    print(f"\n{title}")
    sites = list(next(iter(found.columns.values())))
    rows = [[site, *(_cell(found.columns[name][site]) for name in names)] for site in sites]
    print_table(
        ["site", *names], [*rows, ["mean", *(_cell(found.overall[name]) for name in names)]]
    )
    for note in found.notes:
        print(f"  {note}")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def compare(
    student: Side, teacher: Side, texts: Sequence[str], scratch: Path, *, seed: int
) -> Found:
    """Fit on four fifths of the texts, fold, and score the folded models on the rest."""
    scratch.mkdir()
    pairs = [_pair(student, teacher, text) for text in texts]
    train = [each for number, each in enumerate(pairs) if number % HELD_OUT]
    held = pairs[::HELD_OUT]
    layer_map = list(range(shape_of(student.model).layers))
    sums, kept = (_captured(student, teacher, part, layer_map) for part in (train, held))
    orders, notes = _orders(student, teacher, sums, kept)
    means = {site: of.sum_y / of.n for site, of in sums.sites.items()}
    terms = Terms(layer_map, ASKED, means=means, seed=seed)

    def score(model: PreTrainedModel, of: Terms = terms, **more: Any) -> dict[str, Any]:
        return evaluate_variant(model, teacher.model, held, [""] * len(held), of, **more)

    scores = {"before": (score(student.model), "cosine")}
    changes, each = [], score(student.model)
    for name, plan in _plans(student, sums, orders).items():
        folded = load_model(
            fold_folder(student.folder, scratch / name.replace(", ", "-"), plan), device=CPU
        )
        ids = [of.student.ids for of in held[:8]]
        changes.append(logits_change(student.model, folded, ids, device=CPU).relative)
        each = score(folded)
        scores[name] = each, "cosine"
    scores["seen"] = each, "seen"
    scores["shuffled"] = each, "shuffled"
    scores["mean only"] = each, "mean_only"
    width = max(shape_of(student.model).width, shape_of(teacher.model).width)
    scores["least squares"] = score(student.model, maps=_linear(sums.sites, width)), "cosine"
    for k in SUBSPACES:
        turns = rotations(sums.sites, student, "layer", k=k)
        bases = {site: one.teacher_basis for one in turns.values() for site in one.sites}
        maps = {site: one.full for one in turns.values() for site in one.sites}
        within = score(student.model, replace(terms, subspaces=bases), maps=maps)
        scores[f"top {k}"] = within, "subspace"
    notes.append(f"{len(train)} texts fitted on, {len(held)} held out, {_rows(each)} held-out rows")
    reached = max(float(scores[name][0]["overall"]["cosine"]) for name in ROTATED)
    word = "reached" if reached >= HOPED else "not reached"
    notes.append(f"document 002's {HOPED} is {word} over the full width: {reached:.3f}")
    notes.append(f"exact folds changed a logit by at most {max(changes):.1e} of the largest")
    return Found(
        {
            name: {site: at[metric] for site, at in of["sites"].items()}
            for name, (of, metric) in scores.items()
        },
        {name: of["overall"][metric] for name, (of, metric) in scores.items()},
        notes,
        max(changes),
    )


def _rows(scores: Mapping[str, Any]) -> int:
    return max(int(of["rows"]) for of in scores["sites"].values())


def _captured(
    student: Side, teacher: Side, pairs: Sequence[Pair], layer_map: Sequence[int]
) -> Captured:
    return capture(
        student.model,
        teacher.model,
        pairs,
        options=ASKED,
        layer_map=layer_map,
        permute=Permute(),
        report=lambda done, total: None,
    )


def _orders(
    student: Side, teacher: Side, sums: Captured, kept: Captured
) -> tuple[dict[int, LayerPermutation], list[str]]:
    """Match heads and neurons; say how like matched ones are on held-out texts."""
    shapes = {"student": shape_of(student.model), "teacher": shape_of(teacher.model)}
    orders, told = {}, []
    for layer in range(shapes["student"].layers):
        fitted, trial = (
            LayerSums(of.neurons.get(layer), of.heads.get(layer)) for of in (sums, kept)
        )
        orders[layer], report = match_layer(layer, fitted, **shapes, held_out=trial)
        told.append(report)
    notes = []
    for what in ("heads", "neurons"):
        if told[0][what]["skipped"]:
            notes.append(f"{what}: {told[0][what]['skipped']}")
            continue
        before, after = (
            sum(of[what][f"held_out_{when}"] for of in told) / len(told)
            for when in ("before", "after")
        )
        notes.append(f"{what}: held-out likeness {before:.3f} before, {after:.3f} after matching")
    return orders, notes


def _plans(
    student: Side, sums: Captured, orders: Mapping[int, LayerPermutation]
) -> dict[str, FoldPlan]:
    shape = shape_of(student.model)
    one = {group: of.full for group, of in rotations(sums.sites, student, "global").items()}
    each = {group: of.full for group, of in rotations(sums.sites, student, "layer").items()}
    return {
        "permuted": FoldPlan(shape, "none", permutations=orders),
        "rotated, one": FoldPlan(shape, "global", one, permutations=orders),
        "rotated, each": FoldPlan(shape, "sliced", each, tie="layer", permutations=orders),
    }


def rotations(
    moments: Mapping[str, Moments], student: Side, tie: Tie, *, k: int | None = None
) -> dict[str, Rotation]:
    """Solve for the rotation of every group."""
    asked, found = Rotate(tie=tie, k=k), {}
    for group, sites in groups(
        shape_of(student.model), tie=tie, stage_layers=asked.stage_layers
    ).items():
        one, _ = solve({site: moments[site] for site in sites}, asked, group)
        if not isinstance(one, Rotation):
            raise TypeError(f"{group}: not a rotation")
        found[group] = one
    return found


def _linear(moments: Mapping[str, Moments], width: int) -> dict[str, Tensor]:
    """Return the least-squares map of every site, [d_s, width]: no rotation fits better."""
    found = {}
    for site, of in moments.items():
        ridge = RIDGE * of.xx.diagonal().mean() * torch.eye(len(of.xx), dtype=of.xx.dtype)
        fitted = torch.linalg.solve(of.xx + ridge, of.xy)
        found[site] = torch.nn.functional.pad(fitted, (0, width - fitted.shape[1]))
    return found


def _pair(student: Side, teacher: Side, text: str) -> Pair:
    read = [
        encode(side.tokenizer, text, system_prompt="", max_tokens=ASKED.max_tokens)
        for side in (student, teacher)
    ]
    return pair(read[0], read[1], ASKED)


def sampled(sides: Sequence[Side], seed: int) -> list[str]:
    """Return texts that the models wrote themselves, taking turns; the same for the same seed."""
    found = []
    for side in sides:
        torch.manual_seed(seed)
        told: list[str] = []
        while len(told) < TEXTS // len(sides):
            told += [text for text in map(_cut, _written(side)) if len(text) > CHARACTERS // 3]
        found.append(told[: TEXTS // len(sides)])
    return [text for texts in zip(*found, strict=True) for text in texts]


def _written(side: Side) -> list[str]:
    start = torch.full((SAMPLED_AT_ONCE, 1), side.tokenizer.bos_token_id)
    positions = shape_of(side.model).positions
    model: Any = side.model
    ids = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        max_new_tokens=min(CHARACTERS, positions - 1),
        pad_token_id=side.tokenizer.eos_token_id,
    )
    return [str(side.tokenizer.decode(one, skip_special_tokens=True)).strip() for one in ids]


def _cut(text: str) -> str:
    """Cut at a word, so that both models can read all of it."""
    return text if len(text) <= CHARACTERS else text[:CHARACTERS].rpartition(" ")[0]


def _given(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]


def _side(folder: Path) -> Side:
    model = load_model(folder, device=CPU, dtype="float32", maps=True)
    return Side(folder, model, load_tokenizer(folder))


def _disturbed(of: Side, target: Path, seed: int) -> Path:
    """Write a copy, turned by a hidden rotation, whose weights then get noise of their own spread.

    The noise is one that a rotation cannot undo: of NOISE times each weight's standard deviation.
    """
    shape, random = shape_of(of.model), torch.Generator().manual_seed(seed)
    noise = torch.randn(shape.width, shape.width, generator=random, dtype=torch.float64)
    hidden = torch.linalg.qr(noise).Q.contiguous()
    fold_folder(of.folder, target, FoldPlan(shape, "global", {"global": hidden}))
    for path in sorted(target.glob("model*.safetensors")):
        weights = load_file(path)
        for weight in (weights[name] for name in sorted(weights)):
            if weight.ndim == 2:
                spread = NOISE * float(weight.std())
                weight += spread * torch.randn(weight.shape, generator=random)
        save_file(weights, path, metadata={"format": "pt"})
    return target


def _models() -> Path | None:
    """Return the data folder beside a parent of the checkout, where it is there."""
    folders = (parent / "shared/data/tiny_llm" for parent in Path(__file__).resolve().parents)
    return next((folder for folder in folders if folder.is_dir()), None)


if __name__ == "__main__":
    sys.exit(main())
