"""What an evaluation says is what a float64 computation without hooks or batches says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bench._tiny_models import VARIANTS, save_folder, tiny_model
from core.architectures.shape import ModelShape
from core.errors import DataInvalid, SpecInvalid
from core.specs.transport import Capture
from core.transport.evaluation import Terms, evaluate_variant
from core.transport.fold_folders import fold_folder
from core.transport.fold_plans import FoldPlan
from core.transport.loading import load_model
from core.transport.pairs import Pair
from core.transport.sites import groups, sites
from core.transport.streams import shape_of
from tests.core.transport.held_out import LANGUAGES, TEXTS, random_rotation, read, turned

NO_DROPS = Capture(drop_massive=None)


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerBase:
    """One token a character, of ids that the tiny models have."""
    vocabulary = {chr(number): number for number in range(256)}
    whole = Tokenizer(models.WordLevel({**vocabulary, "<s>": 256}, unk_token="<s>"))
    whole.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=whole)


def rows_of(model: PreTrainedModel, ids: Any, layer: int) -> Tensor:
    """Return the normalised stream before a layer's attention, without a hook."""
    with torch.no_grad():
        states = model(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states
    stream = states[layer][0].double()
    return stream / (stream.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()


def cosines(x: Tensor, y: Tensor) -> Tensor:
    return functional.cosine_similarity(x, y, dim=-1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_agrees_with_itself_and_with_its_turned_copy(variant: str) -> None:
    model = tiny_model(variant).double()
    R = random_rotation(32)
    teacher = turned(model, R)
    terms = Terms(layer_map=range(3), capture=Capture(), shared=257)

    before = evaluate_variant(model, teacher, read(), LANGUAGES, terms)
    mapped = evaluate_variant(
        model, teacher, read(), LANGUAGES, terms, maps=dict.fromkeys(sites(shape_of(model)), R)
    )
    folded = evaluate_variant(turned(model, R), teacher, read(), LANGUAGES, terms)

    for after in (mapped, folded):
        assert after["overall"]["cosine"] == pytest.approx(1, abs=1e-6)
        assert after["overall"]["difference_rms"] < 1e-6
        assert after["overall"]["stream_rms_ratio"] == pytest.approx(1)
        assert after["overall"]["channel_rms_factor"] == pytest.approx(1, abs=1e-6)
    assert before["overall"]["cosine"] < 0.5
    assert folded["overall"]["shuffled"] < 0.95
    for found in (before, folded):  # a change of basis changes no prediction
        assert found["tokens"]["kl"] == pytest.approx(0, abs=1e-10)
        assert found["tokens"]["top1_agreement"] == 1
        assert found["tokens"]["nats_per_token"] == pytest.approx(
            found["teacher_tokens"]["nats_per_token"]
        )


def test_cosines_are_those_of_plain_hidden_states() -> None:
    student, teacher = tiny_model(), tiny_model("qwen3", seed=1, num_hidden_layers=4)
    texts, layer_map = read(options=NO_DROPS), (0, 2, 3)
    means = {"attention.1": torch.randn(32, generator=torch.Generator().manual_seed(3)).double()}
    subspace = random_rotation(4, 32, seed=4).mT
    terms = Terms(layer_map, NO_DROPS, means=means, subspaces={"attention.1": subspace}, shared=257)

    found = evaluate_variant(student, teacher, texts, LANGUAGES, terms)["sites"]["attention.1"]

    x = torch.cat([rows_of(student, t.student.ids, 1)[t.alignment.student] for t in texts])
    y = torch.cat([rows_of(teacher, t.teacher.ids, 2)[t.alignment.teacher] for t in texts])
    each = cosines(x, y)
    assert found["rows"] == len(x)
    assert found["cosine"] == pytest.approx(float(each.mean()), abs=1e-6)
    assert found["p5"] == pytest.approx(float(torch.quantile(each, 0.05)), abs=1e-6)
    assert found["mean_only"] == pytest.approx(
        float(cosines(means["attention.1"].expand_as(y), y).mean()), abs=1e-6
    )
    assert found["subspace"] == pytest.approx(
        float(cosines(x @ subspace, y @ subspace).mean()), abs=1e-6
    )
    assert found["difference_rms"] == pytest.approx(
        float((x - y).square().mean().sqrt() / y.square().mean().sqrt()), rel=1e-5
    )
    ratio = (x.square().mean(0) / y.square().mean(0)).sqrt()
    assert found["channel_rms_factor"] == pytest.approx(
        float(torch.maximum(ratio, 1 / ratio).median()), rel=1e-5
    )


def test_stream_sizes_are_those_before_the_norm() -> None:
    student, teacher = tiny_model(), tiny_model(seed=1)
    texts = read(options=NO_DROPS)
    found = evaluate_variant(student, teacher, texts, LANGUAGES, Terms(range(3), NO_DROPS))

    streams = []
    for model in (student, teacher):
        with torch.no_grad():
            of = [
                model(torch.from_numpy(t.student.ids)[None], output_hidden_states=True)
                .hidden_states[2][0][t.alignment.student]
                .double()
                for t in texts
            ]
        streams.append(torch.cat(of))
    x, y = streams
    site = found["sites"]["attention.2"]
    assert site["stream_rms_ratio"] == pytest.approx(float(x.norm() / y.norm()), rel=1e-5)
    assert site["stream_difference_rms"] == pytest.approx(
        float((x - y).norm() / y.norm()), rel=1e-4
    )


def test_predictions_are_those_of_plain_logits() -> None:
    student, teacher = tiny_model(), tiny_model("qwen2", seed=1)
    texts = read()
    terms = Terms(range(3), Capture(), shared=200)

    found = evaluate_variant(student, teacher, texts, LANGUAGES, terms)

    nats, kl, agree, characters = [], [], [], 0
    for text, raw in zip(texts, TEXTS, strict=True):
        ids = torch.from_numpy(text.student.ids)
        with torch.no_grad():
            mine, theirs = (
                model(ids[None]).logits[0, :-1].double() for model in (student, teacher)
            )
        nats.append(-mine.log_softmax(-1).gather(-1, ids[1:, None])[:, 0])
        p, q = theirs[:, :200].log_softmax(-1), mine[:, :200].log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
        characters += len(raw)
    total = torch.cat(nats)
    assert found["tokens"]["tokens"] == len(total)
    assert found["tokens"]["nats_per_token"] == pytest.approx(float(total.mean()), rel=1e-6)
    assert found["tokens"]["bits_per_character"] == pytest.approx(
        float(total.sum()) / characters / 0.6931471805599453, rel=1e-6
    )
    assert found["tokens"]["kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-5)
    assert found["tokens"]["top1_agreement"] == float(torch.cat(agree).double().mean())


def test_batches_do_not_matter_but_for_the_shuffle() -> None:
    student, teacher = tiny_model(), tiny_model("qwen3", seed=1)
    whole, single = (
        evaluate_variant(
            student,
            teacher,
            read(),
            LANGUAGES,
            Terms(range(3), Capture(batch_tokens=n), shared=257),
        )
        for n in (4096, 16)
    )

    assert whole["overall"]["cosine"] == pytest.approx(single["overall"]["cosine"], abs=1e-6)
    assert whole["tokens"]["kl"] == pytest.approx(single["tokens"]["kl"], rel=1e-5)
    assert whole["languages"].keys() == {"de", "en", "unsaid"}
    for language, scores in whole["languages"].items():
        assert scores["cosine"] == pytest.approx(single["languages"][language]["cosine"], abs=1e-6)
    assert whole["standard_error"] == pytest.approx(single["standard_error"], abs=1e-6)


def test_equal_arguments_give_equal_scores() -> None:
    student, teacher = tiny_model(), tiny_model(seed=1)
    terms = Terms(range(3), Capture(), seed=7)
    first, second = (evaluate_variant(student, teacher, read(), LANGUAGES, terms) for _ in range(2))
    other = evaluate_variant(
        student, teacher, read(), LANGUAGES, Terms(range(3), Capture(), seed=8)
    )

    assert first == second
    assert first["overall"]["shuffled"] != other["overall"]["shuffled"]
    assert first["overall"]["cosine"] == other["overall"]["cosine"]


@pytest.mark.parametrize("widths", [(32, 48), (48, 32)])
def test_widths_differ(widths: tuple[int, int]) -> None:
    student, teacher = (
        tiny_model(hidden_size=width, seed=seed) for seed, width in enumerate(widths)
    )
    R = random_rotation(widths[0], max(widths))
    maps = dict.fromkeys(sites(shape_of(student)), R)
    terms = Terms(range(3), Capture())

    before = evaluate_variant(student, teacher, read(), LANGUAGES, terms)
    after = evaluate_variant(student, teacher, read(), LANGUAGES, terms, maps=maps)

    for found in (before, after):  # rows of one length: the difference is the cosine's
        cosine, difference = found["overall"]["cosine"], found["sites"]["final"]["difference_rms"]
        assert difference == pytest.approx(
            (2 - 2 * found["sites"]["final"]["cosine"]) ** 0.5, abs=1e-3
        )
        assert -1 < cosine < 1
        wider = widths[0] > widths[1]
        assert (abs(found["overall"]["seen"] - cosine) > 1e-9) == wider
    assert before["tokens"]["kl"] is None
    assert "tokenizers differ" in before["unavailable"]["kl"]
    assert ("channel_rms_factor" in before["unavailable"]) == (widths[0] < widths[1])


@pytest.mark.parametrize("width", [32, 48])
def test_folded_folders_stand_where_their_maps_say(width: int, tmp_path: Path) -> None:
    student, teacher = tiny_model("qwen2_tied"), tiny_model(seed=1, hidden_size=width)
    shape = shape_of(student)
    names = ["layer.0", "layer.1", "layer.2", "final"]
    turns = {name: random_rotation(32, width, seed=seed) for seed, name in enumerate(names)}
    maps = {site: turns[group] for group, of in by_layer(shape).items() for site in of}
    terms = Terms(range(3), Capture())
    folder = fold_folder(
        save_folder(student, tmp_path / "model"),
        tmp_path / "folded",
        FoldPlan(shape, "sliced", turns, tie="layer"),
    )

    mapped = evaluate_variant(student, teacher, read(), LANGUAGES, terms, maps=maps)
    folded = evaluate_variant(
        load_model(folder, device=torch.device("cpu")), teacher, read(), LANGUAGES, terms
    )

    assert folded["tokens"]["nats_per_token"] == pytest.approx(mapped["tokens"]["nats_per_token"])
    for site, told in folded["sites"].items():
        for score, value in mapped["sites"][site].items():
            assert told[score] == pytest.approx(value, abs=1e-4), (site, score)


def by_layer(shape: ModelShape) -> Mapping[str, tuple[str, ...]]:
    return groups(shape, tie="layer", stage_layers=1)


def test_unequal_tokens_of_equal_tokenizers_are_not_compared(
    letters: PreTrainedTokenizerBase,
) -> None:
    student, teacher = tiny_model(), tiny_model(seed=1)
    terms = Terms(range(3), Capture(), shared=257)

    found = evaluate_variant(student, teacher, read(teacher=letters), LANGUAGES, terms)

    assert found["tokens"]["kl"] is None
    assert "cut a held-out text" in found["unavailable"]["kl"]
    assert found["teacher_tokens"]["bits_per_character"] > 0


def test_span_average_takes_the_mean_of_the_teachers_rows() -> None:
    options = Capture(alignment="span_average", drop_massive=None)
    student, teacher = tiny_model(), tiny_model(seed=1)
    texts = read(options=options)

    found = evaluate_variant(student, teacher, texts, LANGUAGES, Terms(range(3), options))

    x, y = [], []
    for text in texts:
        rows = rows_of(teacher, text.teacher.ids, 1)
        spans = zip(text.alignment.teacher_start, text.alignment.teacher_stop, strict=True)
        y += [rows[start:stop].mean(0) for start, stop in spans]
        x.append(rows_of(student, text.student.ids, 1)[text.alignment.student])
    assert found["sites"]["attention.1"]["cosine"] == pytest.approx(
        float(cosines(torch.cat(x), torch.stack(y)).mean()), abs=1e-6
    )


def test_chosen_layers_alone_are_scored_and_progress_may_end_it() -> None:
    student, teacher = tiny_model(), tiny_model(seed=1)
    terms = Terms(range(3), Capture(batch_tokens=16), layers=(1,))
    seen: list[tuple[float, float]] = []

    found = evaluate_variant(
        student, teacher, read(), LANGUAGES, terms, report=lambda *at: seen.append(at)
    )

    assert list(found["sites"]) == ["attention.1", "mlp.1", "final"]
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]

    def stop(done: float, total: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_variant(student, teacher, read(), LANGUAGES, terms, report=stop)
    assert not student.model.norm._forward_pre_hooks


@pytest.mark.parametrize(
    ("terms", "error", "words"),
    [
        (Terms((0, 1), Capture()), DataInvalid, "layer_map"),
        (Terms((0, 1, 3), Capture()), DataInvalid, "below 3"),
        (Terms(range(3), Capture(), layers=(3,)), SpecInvalid, "layers 0 to 2"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    terms: Terms, error: type[Exception], words: str
) -> None:
    model = tiny_model()
    with pytest.raises(error, match=words):
        evaluate_variant(model, model, read(), LANGUAGES, terms)


def test_ids_beyond_a_vocabulary_and_texts_without_pairs_are_refused() -> None:
    model, small = tiny_model(), tiny_model(vocab_size=100, bos_token_id=1, eos_token_id=2)
    terms = Terms(range(3), Capture())
    with pytest.raises(DataInvalid, match="teacher's tokenizer gives the id 256"):
        evaluate_variant(model, small, read(), LANGUAGES, terms)
    empty: list[Pair] = []
    with pytest.raises(DataInvalid, match="none has tokens"):
        evaluate_variant(model, model, empty, (), terms)
