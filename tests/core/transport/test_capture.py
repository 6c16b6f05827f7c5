"""Moments of two models against a float64 reference that uses no hooks of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from core.errors import DataInvalid
from core.specs.transport import Capture, Permute
from core.transport.capture import capture
from core.transport.moments import Captured, Moments, moments_bytes, permuted_layers
from core.transport.pairs import Pair, pair, plan_batches
from core.transport.sites import sites, teacher_site
from core.transport.streams import shape_of
from core.transport.tokens import encode
from tests.core.transport.models import VARIANTS, byte_tokenizer, tiny_model

TEXTS = ["Ein Turm am See.", "The old mill, built in 1812, still turns.", "Zoë 🌉", "a b c d e f"]


def silent(_: float, __: float) -> None:
    pass


def paired(
    texts: Sequence[str] = TEXTS, *, teacher: Any = None, options: Capture | None = None
) -> list[Pair]:
    options = options or Capture()
    ours, theirs = byte_tokenizer(), teacher or byte_tokenizer()
    found = []
    for text in texts:
        cut = [
            encode(of, text, system_prompt=options.system_prompt, max_tokens=options.max_tokens)
            for of in (ours, theirs)
        ]
        found.append(pair(cut[0], cut[1], options))
    return found


def captured(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    pairs: Sequence[Pair],
    options: Capture | None = None,
    permute: Permute | None = None,
    layer_map: Sequence[int] | None = None,
) -> Captured:
    layers = layer_map or tuple(range(shape_of(student).layers))
    return capture(
        student,
        teacher,
        pairs,
        options=options or Capture(),
        layer_map=layers,
        permute=permute,
        report=silent,
    )


def reference_streams(model: PreTrainedModel, ids: np.ndarray) -> dict[str, Tensor]:
    """Every site's stream before the norm in float64, block by block from transformers' parts."""
    shape = shape_of(model)
    out = model(torch.from_numpy(ids)[None], output_hidden_states=True)
    found = {f"attention.{layer}": out.hidden_states[layer][0] for layer in range(shape.layers)}
    # transformers' last hidden state is behind the final norm: the last block runs once more.
    base: Any = model.base_model
    place = torch.arange(len(ids))[None]
    angles = base.rotary_emb(out.hidden_states[0], place)
    mask = torch.full((len(ids), len(ids)), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    stream = out.hidden_states[0]
    for layer, block in enumerate(base.layers):
        gave, _ = block.self_attn(
            hidden_states=block.input_layernorm(stream),
            position_embeddings=angles,
            attention_mask=mask,
        )
        found[f"mlp.{layer}"] = (stream + gave)[0]
        stream = stream + gave + block.mlp(block.post_attention_layernorm(stream + gave))
    found["final"] = stream[0]
    return found


def normed(stream: Tensor, eps: float) -> Tensor:
    return stream / (stream.square().mean(-1, keepdim=True) + eps).sqrt()


@torch.no_grad()
def reference(
    student: PreTrainedModel, teacher: PreTrainedModel, pairs: Sequence[Pair], options: Capture
) -> dict[str, Moments]:
    """Sum text by text in float64; rows [P, d] weighed one by one."""
    shape, other = shape_of(student), shape_of(teacher)
    layers = tuple(range(shape.layers))
    found = {
        site: Moments.zeros(shape.width, other.width, device=torch.device("cpu"))
        for site in sites(shape)
    }
    for text in pairs:
        ours = reference_streams(student, text.student.ids)
        theirs = reference_streams(teacher, text.teacher.ids)
        for site in found:
            x, y = ours[site], theirs[teacher_site(site, layers)]
            rows = torch.from_numpy(text.alignment.student)
            last = torch.from_numpy(text.alignment.teacher)
            weight = torch.ones(len(rows), dtype=torch.float64)
            for length in (x[rows].norm(dim=-1), y[last].norm(dim=-1)):
                if options.drop_massive is not None:
                    weight *= length <= options.drop_massive * length.median()
            if options.token_weights == "text":
                weight /= max(1.0, float(weight.sum()))
            start, stop = text.alignment.teacher_start, text.alignment.teacher_stop
            spans = (
                [[at] for at in last.tolist()]
                if start is None or stop is None
                else [list(range(a, b)) for a, b in zip(start, stop, strict=True)]
            )
            x = normed(x, shape.norm_eps)[rows]
            whole = normed(y, other.norm_eps)
            y = torch.stack([whole[span].mean(0) for span in spans])
            w = weight[:, None]
            found[site] += Moments(
                weight.sum(),
                (w * x).sum(0),
                (w * y).sum(0),
                x.T @ (w * x),
                y.T @ (w * y),
                x.T @ (w * y),
            )
    return found


def assert_close(found: Captured, wanted: dict[str, Moments], *, rtol: float) -> None:
    assert found.sites.keys() == wanted.keys()
    for site, moments in found.sites.items():
        for name, sums in moments.tensors().items():
            truth = wanted[site].tensors()[name]
            assert float((sums - truth).abs().max()) <= rtol * float(truth.abs().max()), (
                site,
                name,
            )


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_moments_are_those_of_a_float64_reference(variant: str) -> None:
    student, teacher = tiny_model(variant), tiny_model(variant, seed=1, hidden_size=48)
    pairs = paired()

    found = captured(student, teacher, pairs)

    wanted = reference(student.double(), teacher.double(), pairs, Capture())
    assert_close(found, wanted, rtol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        Capture(drop_bos=False),
        Capture(drop_massive=1.05, token_weights="text"),
        Capture(drop_massive=None, system_prompt="Be brief."),
        Capture(max_tokens=12),
    ],
)
def test_options_choose_and_weigh_rows(options: Capture) -> None:
    student, teacher = tiny_model().double(), tiny_model(seed=1).double()
    pairs = paired(options=options)

    found = captured(student, teacher, pairs, options)

    assert_close(found, reference(student, teacher, pairs, options), rtol=1e-12)
