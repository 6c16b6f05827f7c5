"""How near one model is to the teacher on held-out texts: states, predictions, by language.

A change of basis moves the states and leaves the predictions: it transfers no knowledge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from core.errors import DataInvalid, SpecInvalid
from core.specs.transport import Capture
from core.transport import sites as places
from core.transport.capture import Table
from core.transport.pairs import Batch, Pair, make_batch, plan_batches
from core.transport.predictions import Predictions, compare_tokens, head_of, score_tokens, scored
from core.transport.scores import SiteScores, TokenScores, at_width, mean_over_sites, strangers
from core.transport.streams import first_device, lengths, normalised, reading, shape_of
from core.transport.tokens import Ints

Report = Callable[[float, float], None]
UNSAID = "unsaid"
"""The language of texts that name none."""


@dataclass(frozen=True)
class Terms:
    """On what terms variants are compared with the teacher: the same for all of them."""

    layer_map: Sequence[int]
    """Per layer of the student, the teacher's beside it."""
    capture: Capture
    """Of it ``drop_massive``: which rows count, and ``batch_tokens``: how many run at once."""
    layers: Collection[int] = ()
    """Of the student, whose sites are scored beside the final norm; empty: all."""
    means: Mapping[str, Tensor] = field(default_factory=dict)
    """By site of the student: the teacher's mean row on training texts, [d_t]."""
    subspaces: Mapping[str, Tensor] = field(default_factory=dict)
    """By site of the student: the teacher's side of the shared subspace, [d_t, k]."""
    shared: int = 0
    """Ids that mean the same to both tokenizers; 0: predictions cannot be compared id by id."""
    seed: int = 0
    """Of the shuffled pairs."""


@torch.no_grad()
def evaluate_variant(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Sequence[Pair],
    languages: Sequence[str],
    terms: Terms,
    *,
    maps: Mapping[str, Tensor] | None = None,
    report: Report = lambda done, total: None,
) -> dict[str, Any]:
    """Score one variant of the student against the teacher; both stay in memory.

    Rows of both models are brought to the common width D, the narrower ones by zeros, and to the
    RMS 1 there; a massive row (``drop_massive``) is left out, as in the fit. Beside both models and
    one batch's rows of the student nothing is held that grows with widths times texts.

    Args:
        student: the variant, in evaluation mode.
        teacher: in evaluation mode.
        texts: held out by document, as ``pairs.pair`` gives them.
        languages: of each text; empty where nobody said.
        terms: what is compared.
        maps: by site, [d_s, D]: turns rows of a variant that was not turned itself; None: its own
            coordinates.
        report: called with tokens done and to do; may raise.

    Returns:
        JSON values: ``texts``; ``sites``, each ``SiteScores.result``, and ``overall``, their mean;
        ``standard_error`` of the overall cosine, over texts; ``tokens`` and ``teacher_tokens``,
        each ``TokenScores.result``; ``languages``; ``unavailable``: why a number is None.

    Raises:
        DataInvalid: no text has paired rows, ids are beyond a vocabulary, or the layer map is of
            other models.
        SpecInvalid: a layer is asked for that the student lacks.
    """
    run = _Run(student, teacher, texts, terms, maps)
    plan = plan_batches(texts, batch_tokens=terms.capture.batch_tokens)
    if not plan:
        raise DataInvalid(f"{len(texts)} held-out texts: none has tokens that are paired")
    batches = [make_batch(texts, numbers) for numbers in plan]
    todo, done = sum(batch.tokens for batch in batches), 0
    for number, batch in enumerate(batches):

        def progress(share: float, done: int = done, size: int = batch.tokens) -> None:
            report(done + share * size, todo)

        _Pass(run, batch, number, progress).through()
        done += batch.tokens
        report(done, todo)
    return run.result(languages)


class _Run:
    """What all batches add to."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        texts: Sequence[Pair],
        terms: Terms,
        maps: Mapping[str, Tensor] | None,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.texts, self.terms, self.maps = texts, terms, maps
        shape, other = shape_of(student), shape_of(teacher)
        _check_layers(terms, shape.layers, other.layers)
        _check_ids(texts, shape.vocabulary, other.vocabulary)
        self.width = max(shape.width, other.width)
        if maps:
            self.width = max(self.width, *(turn.shape[1] for turn in maps.values()))
        wanted = terms.layers or range(shape.layers)
        self.sites = {
            site: SiteScores(
                len(texts),
                teacher_width=other.width,
                mean=terms.means.get(site),
                subspace=terms.subspaces.get(site),
            )
            for site in places.sites(shape)
            if places.layer_of(site) in {None, *wanted}
        }
        self.beside: dict[str, list[str]] = {}
        for site in self.sites:
            self.beside.setdefault(places.teacher_site(site, terms.layer_map), []).append(site)
        self.tokens, self.teacher_tokens = TokenScores(len(texts)), TokenScores(len(texts))
        self.same = all(_same(text.student.ids, text.teacher.ids) for text in texts)

    @property
    def shared(self) -> int:
        """Ids whose predictions are compared."""
        return self.terms.shared if self.same else 0

    def result(self, languages: Sequence[str]) -> dict[str, Any]:
        sites = {site: scores.result() for site, scores in self.sites.items()}
        if not any(found["rows"] for found in sites.values()):
            raise DataInvalid("held-out texts: every paired token was left out as massive")
        by_text = torch.stack([scores.by_text() for scores in self.sites.values()]).sum(0)
        return {
            "texts": len(self.texts),
            "sites": sites,
            "overall": mean_over_sites(sites),
            "standard_error": _standard_error(by_text),
            "tokens": self.tokens.result(),
            "teacher_tokens": self.teacher_tokens.result(),
            "languages": self._languages(languages, by_text),
            "unavailable": self._unavailable(),
        }

    def _languages(self, languages: Sequence[str], by_text: Tensor) -> dict[str, Any]:
        of: dict[str, list[int]] = {}
        for text, language in enumerate(languages):
            of.setdefault(language or UNSAID, []).append(text)
        found: dict[str, Any] = {}
        for language, texts in sorted(of.items()):
            total, rows = by_text[:, texts].sum(1).tolist()
            cosine = total / rows if rows else None
            found[language] = {
                "texts": len(texts),
                "cosine": cosine,
                **self.tokens.result(texts),
            }
        return found

    def _unavailable(self) -> dict[str, str]:
        found = {}
        if not self.terms.shared:
            why = "the tokenizers differ, so an id means different text to either model"
            found["kl"] = found["top1_agreement"] = why
        elif not self.same:
            why = "the tokenizers are equal, and yet cut a held-out text into different tokens"
            found["kl"] = found["top1_agreement"] = why
        if not self.terms.means:
            found["mean_only"] = "the teacher's mean on training texts was not given"
        if not self.terms.subspaces:
            found["subspace"] = "no shared subspace was given"
        if self.maps is None and shape_of(self.student).width < self.width:
            found["channel_rms_factor"] = (
                f"the variant has {shape_of(self.student).width} channels, the common width is "
                f"{self.width}: those beyond have nothing to compare"
            )
        return found


class _Pass:
    """One batch on its way through both models."""

    def __init__(
        self, run: _Run, batch: Batch, number: int, progress: Callable[[float], None]
    ) -> None:
        self.run, self.batch, self.progress = run, batch, progress
        device = first_device(run.teacher)
        self.table = Table(batch.counts, device)
        self.text = torch.tensor(batch.texts, device=device)[self.table.text]
        self.rows: dict[str, tuple[Tensor, Tensor]] = {}
        """By site: the student's paired rows, normalised, and the stream's RMS."""
        self.seed = (run.terms.seed * 1_000_003 + number) % (1 << 63)
        self.device, self.steps = device, 0

    def through(self) -> None:
        """Run the student, then the teacher, whose rows are used up as they come."""
        run, batch = self.run, self.batch
        with reading(run.student, stream=self._student, only=run.sites):
            own = _final(run.student, batch.student_ids)
        with reading(run.teacher, stream=self._teacher, only=run.beside):
            teacher = _final(run.teacher, batch.teacher_ids)
        self._predictions(own, teacher)

    def _student(self, site: str, stream: Tensor, eps: float) -> None:
        rows = self._take(stream, self.batch.student_rows)
        self.rows[site] = normalised(rows, eps), _rms(rows)
        self._step()

    def _teacher(self, site: str, stream: Tensor, eps: float) -> None:
        size = _rms(self._take(stream, self.batch.teacher_rows))
        if self.batch.spans is None:
            rows = normalised(self._take(stream, self.batch.teacher_rows), eps)
        else:
            within, sizes = self.batch.spans
            each = normalised(self._take(stream, within), eps)
            rows = torch.segment_reduce(each, "mean", lengths=sizes.to(each.device), axis=0)
        for own in self.run.beside[site]:
            self._meet(own, *self.rows.pop(own), rows, size)
            self._step()

    def _meet(self, site: str, x: Tensor, x_rms: Tensor, y: Tensor, y_rms: Tensor) -> None:
        run = self.run
        counts = self.table.weights([x_rms.to(y_rms), y_rms], run.terms.capture) > 0
        partner = strangers(int(counts.sum()), self.seed).to(y.device)
        turn = None if run.maps is None else run.maps[site]
        run.sites[site].add(
            at_width(x.to(y)[counts], run.width, turn),
            at_width(y[counts], run.width),
            rms=(x_rms.to(y_rms)[counts], y_rms[counts]),
            texts=self.text[counts],
            partner=partner,
        )

    def _predictions(self, own: Tensor, teacher: Tensor) -> None:
        """Score tokens by the final states, [B, T, d] each."""
        run, sides = self.run, []
        for which, (model, states) in enumerate(((run.student, own), (run.teacher, teacher))):
            sides.append(self._side(model, states, teacher=bool(which)))
        if run.shared:
            compare_tokens(run.tokens, run.teacher_tokens, *sides, shared=run.shared)
        else:
            score_tokens(run.tokens, sides[0])
            score_tokens(run.teacher_tokens, sides[1])

    def _side(self, model: PreTrainedModel, states: Tensor, *, teacher: bool) -> Predictions:
        run, rows, ids, texts = self.run, [], [], []
        scores = run.teacher_tokens if teacher else run.tokens
        for place, text in enumerate(self.batch.texts):
            pair = run.texts[text]
            of, other = (pair.teacher, pair.student) if teacher else (pair.student, pair.teacher)
            positions, characters = scored(of, other)
            scores.add(text, characters=characters)
            rows.append(torch.from_numpy(positions - 1) + place * states.shape[1])
            ids.append(torch.from_numpy(of.ids[positions]))
            texts += [text] * len(positions)
        hidden = states.flatten(0, 1)[torch.cat(rows).to(states.device)]
        return Predictions(head_of(model), hidden, torch.cat(ids), texts)

    def _take(self, stream: Tensor, rows: Tensor) -> Tensor:
        """Return some rows of [B, T, d] on the device where they are compared."""
        return stream.flatten(0, 1).index_select(0, rows.to(stream.device)).to(self.device)

    def _step(self) -> None:
        self.steps += 1
        self.progress(self.steps / (2 * len(self.run.sites) + 1))


def _final(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the states behind the final norm, [B, T, d]."""
    states: Tensor = model.base_model(input_ids=ids.to(first_device(model)), use_cache=False)[0]
    return states


def _rms(stream: Tensor) -> Tensor:
    """Return [P]: a fold that widens the stream lengthens it too, so that this stays."""
    return lengths(stream) / math.sqrt(stream.shape[-1])


def _same(own: Ints, teacher: Ints) -> bool:
    return own.shape == teacher.shape and bool((own == teacher).all())


def _standard_error(by_text: Tensor) -> float | None:
    """Return that of the mean cosine, over texts; None of fewer than two."""
    cosines = by_text[0][by_text[1] > 0] / by_text[1][by_text[1] > 0]
    return float(cosines.std()) / math.sqrt(len(cosines)) if len(cosines) > 1 else None


def _check_layers(terms: Terms, layers: int, teacher_layers: int) -> None:
    told = terms.layer_map
    if len(told) != layers or not all(0 <= layer < teacher_layers for layer in told):
        raise DataInvalid(
            f"layer_map {list(told)[:8]}: needed {layers} entries, each below {teacher_layers}"
        )
    if beyond := sorted(layer for layer in terms.layers if not 0 <= layer < layers):
        raise SpecInvalid(
            f"layers: {beyond[0]}; the student has layers 0 to {layers - 1}",
            pointer="/evaluate/layers",
        )


def _check_ids(texts: Sequence[Pair], vocabulary: int, teacher_vocabulary: int) -> None:
    for text in texts:
        for whose, ids, rows in (
            ("student", text.student.ids, vocabulary),
            ("teacher", text.teacher.ids, teacher_vocabulary),
        ):
            if len(ids) and int(ids.max()) >= rows:
                raise DataInvalid(
                    f"held-out texts: the {whose}'s tokenizer gives the id {int(ids.max())}; its "
                    f"model has {rows} rows"
                )
