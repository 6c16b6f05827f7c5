"""Moments of two models against a float64 reference that uses no hooks of ours."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench._tiny_models import VARIANTS, tiny_model
from core.errors import Cancelled, DataInvalid
from core.specs.transport import Capture, Permute
from core.transport.capture import capture
from core.transport.memory import moments_bytes
from core.transport.moments import Captured, Moments
from core.transport.pairs import Pair, plan_batches
from core.transport.sites import sites, teacher_site
from core.transport.streams import shape_of
from core.transport.tokens import Ints
from tests.core.transport.readings import BYTES, MERGES, TEXTS, captured, eager, paired

CPU = torch.device("cpu")


def streams_of(model: PreTrainedModel, ids: Ints) -> dict[str, Tensor]:
    """Compute every site's stream before the norm, block by block from transformers' parts."""
    base: Any = model.base_model
    stream = base.embed_tokens(torch.from_numpy(ids)[None])
    angles = base.rotary_emb(stream, torch.arange(len(ids))[None])
    mask = torch.full((len(ids), len(ids)), -torch.inf, dtype=stream.dtype).triu(1)[None, None]
    found = {}
    for layer, block in enumerate(base.layers):
        found[f"attention.{layer}"] = stream[0]
        gave, maps = block.self_attn(
            hidden_states=block.input_layernorm(stream),
            position_embeddings=angles,
            attention_mask=mask,
        )
        stream = stream + gave
        found[f"mlp.{layer}"] = stream[0]
        given = block.post_attention_layernorm(stream)
        mlp = block.mlp
        inner = torch.nn.functional.silu(mlp.gate_proj(given)) * mlp.up_proj(given)
        found[f"neurons.{layer}"], found[f"maps.{layer}"] = inner[0], maps
        stream = stream + mlp.down_proj(inner)
    found["final"] = stream[0]
    return found


def normed(stream: Tensor, eps: float) -> Tensor:
    return stream / (stream.square().mean(-1, keepdim=True) + eps).sqrt()


def reference_weight(options: Capture, lengths: Sequence[Tensor]) -> Tensor:
    weight = torch.ones(len(lengths[0]), dtype=torch.float64)
    for length in lengths:
        if options.drop_massive is not None:
            weight *= length <= options.drop_massive * length.median()
    return weight / max(1.0, float(weight.sum())) if options.token_weights == "text" else weight


@torch.no_grad()
def reference(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    pairs: Sequence[Pair],
    options: Capture,
    layer_map: Sequence[int] = (0, 1, 2),
) -> dict[str, Moments]:
    """Sum text by text in float64."""
    shape, other = shape_of(student), shape_of(teacher)
    found = {site: Moments.zeros(shape.width, other.width, device=CPU) for site in sites(shape)}
    for text in pairs:
        ours = streams_of(student, text.student.ids)
        theirs = streams_of(teacher, text.teacher.ids)
        rows, last = text.alignment.student.tolist(), text.alignment.teacher.tolist()
        start, stop = text.alignment.teacher_start, text.alignment.teacher_stop
        spans = [[row] for row in last]
        if start is not None and stop is not None:
            spans = [list(range(a, b)) for a, b in zip(start, stop, strict=True)]
        for site in found:
            x, y = ours[site], theirs[teacher_site(site, layer_map)]
            w = reference_weight(options, [x[rows].norm(dim=-1), y[last].norm(dim=-1)])[:, None]
            x = normed(x, shape.norm_eps)[rows]
            whole = normed(y, other.norm_eps)
            y = torch.stack([whole[span].mean(0) for span in spans])
            sums = w.sum(), (w * x).sum(0), (w * y).sum(0)
            found[site] += Moments(*sums, x.T @ (w * x), y.T @ (w * y), x.T @ (w * y))
    return found


def assert_close(found: Captured, wanted: dict[str, Moments], *, rtol: float) -> None:
    assert found.sites.keys() == wanted.keys()
    for site, moments in found.sites.items():
        for name, sums in moments.tensors().items():
            truth = wanted[site].tensors()[name]
            assert float((sums - truth).abs().max()) <= rtol * float(truth.abs().max()), name


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
    pairs = paired(options)

    found = captured(student, teacher, pairs, options)

    assert_close(found, reference(student, teacher, pairs, options), rtol=1e-12)
    if options.token_weights == "text":
        torch.testing.assert_close(found.sites["mlp.1"].n, torch.tensor(4.0).double())


def test_the_first_token_is_left_out_unless_it_is_asked_for() -> None:
    student, teacher = tiny_model(), tiny_model(seed=1)
    without, beside = (
        captured(student, teacher, paired(options), options).sites["final"].n
        for options in (Capture(drop_massive=None), Capture(drop_massive=None, drop_bos=False))
    )

    assert (without, beside) == (sum(len(text.encode()) for text in TEXTS), without + len(TEXTS))


def test_a_token_with_a_massive_stream_counts_nothing() -> None:
    student, teacher = tiny_model(), tiny_model(seed=1)
    embedding: Any = teacher.get_input_embeddings()
    embedding.weight.data[ord("d")] *= 1000.0  # of the byte-level alphabet, one letter's row
    letter = BYTES.convert_tokens_to_ids("d")
    embedding.weight.data[letter] *= 1000.0
    pairs = paired(texts=["a b c d e f", "no such letter"])

    found = captured(student, teacher, pairs).sites["attention.0"]
    everything = captured(student, teacher, pairs, Capture(drop_massive=None)).sites["attention.0"]

    assert everything.n - found.n == 1


@pytest.mark.parametrize("how", ["last", "span_average"])
@pytest.mark.parametrize("cutters", [(BYTES, MERGES), (MERGES, BYTES)], ids=["finer", "coarser"])
def test_other_tokenizers_are_aligned(how: Any, cutters: tuple[Any, Any]) -> None:
    options = Capture(alignment=how)
    student, teacher = tiny_model().double(), tiny_model("qwen3", seed=1).double()
    pairs = paired(options, student=cutters[0], teacher=cutters[1])
    assert any(len(text.student.ids) != len(text.teacher.ids) for text in pairs)

    found = captured(student, teacher, pairs, options)

    assert_close(found, reference(student, teacher, pairs, options), rtol=1e-12)


@pytest.mark.parametrize(("deep", "shallow", "layer_map"), [(4, 2, (0, 0, 1, 1)), (2, 4, (0, 3))])
def test_layers_stand_beside_those_of_the_map(
    deep: int, shallow: int, layer_map: tuple[int, ...]
) -> None:
    student = tiny_model(num_hidden_layers=deep).double()
    teacher = tiny_model(seed=1, num_hidden_layers=shallow).double()
    pairs = paired()

    found = captured(student, teacher, pairs, layer_map=layer_map)

    assert_close(found, reference(student, teacher, pairs, Capture(), layer_map), rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("cutters", [(BYTES, BYTES), (BYTES, MERGES), (MERGES, BYTES)])
def test_neurons_and_heads_are_summed_on_aligned_tokens(cutters: tuple[Any, Any]) -> None:
    student = eager(tiny_model("qwen2")).double()
    teacher = eager(tiny_model(seed=1, hidden_size=48)).double()
    pairs = paired(student=cutters[0], teacher=cutters[1])

    found = captured(student, teacher, pairs, permute=Permute(layers=(0, 2)))

    assert (list(found.neurons), list(found.heads)) == ([0, 2], [0, 2])
    x, y = [], []
    heads = torch.zeros(4, 4, dtype=torch.float64)
    for text in pairs:
        ours = streams_of(student, text.student.ids)
        theirs = streams_of(teacher, text.teacher.ids)
        rows, last = text.alignment.student.tolist(), text.alignment.teacher.tolist()
        x.append(ours["neurons.2"][rows])
        y.append(theirs["neurons.2"][last])
        asked = ours["maps.2"][0][:, rows][:, :, rows]
        whole = theirs["maps.2"][0][:, last]
        gathered = torch.zeros_like(asked)
        keys = text.teacher_keys()
        for at, pair_at in keys.nonzero().tolist():
            gathered[:, :, pair_at] += whole[:, :, at]
        heads += torch.einsum("iqk,jqk->ij", asked, gathered)
    neurons = found.neurons[2]
    rows_x, rows_y = torch.cat(x), torch.cat(y)
    # The softmax of eager attention is float32, whatever the model computes in.
    for sums, truth in (
        (neurons.xy, rows_x.T @ rows_y),
        (neurons.xx, rows_x.square().sum(0)),
        (neurons.sum_y, rows_y.sum(0)),
        (found.heads[2].xy, heads),
    ):
        torch.testing.assert_close(sums, truth, rtol=1e-6, atol=1e-5 * float(truth.abs().max()))


def test_a_permuted_copy_has_the_same_maps_in_another_order() -> None:
    student = eager(tiny_model("llama_all_heads")).double()
    teacher = eager(tiny_model("llama_all_heads")).double()
    order = torch.tensor([2, 0, 3, 1])
    block: Any = teacher.base_model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(block, name).weight.data
        weight.copy_(weight.view(4, 8, -1)[order].flatten(0, 1))
    weight = block.o_proj.weight.data
    weight.copy_(weight.view(-1, 4, 8)[:, order].flatten(1))

    heads = captured(student, teacher, paired(), permute=Permute()).heads[1]

    cosine = heads.xy / (heads.xx[:, None] * heads.yy).sqrt()
    torch.testing.assert_close(cosine[order].diagonal(), torch.ones(4).double(), rtol=0, atol=1e-5)
    assert torch.equal(cosine.argmax(0), order)


def test_any_split_of_the_texts_adds_up() -> None:
    student, teacher = eager(tiny_model()), eager(tiny_model(seed=1))
    pairs = paired()

    def sums(of: Sequence[Pair]) -> dict[str, Any]:
        return dict(captured(student, teacher, of, permute=Permute()).sums())

    whole = sums(pairs)
    parts = [sums([text]) for text in pairs]

    assert {name.partition(".")[0] for name in whole} == {
        "attention",
        "mlp",
        "final",
        "neurons",
        "heads",
    }
    for name, of in whole.items():
        added = functools.reduce(operator.add, [part[name] for part in parts])
        for what, total in added.tensors().items():
            torch.testing.assert_close(total, of.tensors()[what], rtol=1e-5, atol=1e-4)


def test_how_texts_are_batched_does_not_matter() -> None:
    student, teacher = tiny_model().double(), tiny_model("qwen2", seed=1).double()
    pairs = paired()
    assert len(plan_batches(pairs, batch_tokens=16)) == len(pairs)

    alone = captured(student, teacher, pairs, Capture(batch_tokens=16))
    together = captured(student, teacher, pairs, Capture(batch_tokens=4096))

    assert_close(alone, dict(together.sites), rtol=1e-12)


def test_equal_arguments_give_equal_bits() -> None:
    student, teacher = tiny_model(), tiny_model(seed=1)

    first, second = (captured(student, teacher, paired()) for _ in range(2))

    for site, moments in first.sites.items():
        for what, sums in moments.tensors().items():
            assert torch.equal(sums, second.sites[site].tensors()[what])


def test_the_formula_counts_every_sum() -> None:
    student, teacher = eager(tiny_model()), eager(tiny_model(seed=1, hidden_size=48))
    permute = Permute(layers="every_other")

    found = captured(student, teacher, paired(), permute=permute)

    taken = sum(tensor.nbytes for _, sums in found.sums() for tensor in sums.tensors().values())
    assert taken == moments_bytes(shape_of(student), shape_of(teacher), permute)


def test_what_cannot_be_permuted_is_not_summed() -> None:
    student = tiny_model()
    teacher = tiny_model(seed=1, intermediate_size=64, num_key_value_heads=1)

    found = captured(student, teacher, paired(), permute=Permute())

    assert not found.neurons
    assert not found.heads


def test_a_stream_that_is_not_finite_is_refused_with_its_site() -> None:
    student, teacher = tiny_model(), tiny_model(seed=1)
    weights: Any = teacher.base_model.layers[1].mlp.down_proj.weight  # type: ignore[index,union-attr]
    weights.data[3, 4] = torch.nan

    with pytest.raises(DataInvalid, match=r"attention\.2: .* not finite"):
        captured(student, teacher, paired())


def test_texts_without_a_pair_are_refused() -> None:
    model = tiny_model()

    with pytest.raises(DataInvalid, match="none has tokens of both"):
        captured(model, model, [])


def test_progress_rises_and_cancelling_ends_the_pass() -> None:
    model, seen = tiny_model(), list[float]()

    def report(done: float, total: float) -> None:
        seen.append(done / total)
        if len(seen) == 10:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        capture(
            model,
            model,
            paired(),
            options=Capture(),
            layer_map=range(3),
            permute=None,
            report=report,
        )

    assert seen == sorted(seen)
    assert not any(module._forward_pre_hooks for module in model.modules())
