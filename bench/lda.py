"""Students of LDA teachers on held-out questions, beside what is had without learning anything.

Teachers: WordNet's filing pairs by 18 and by 64 heads (k-means on the targets), and the 240 real
questions of 30 answers in ../shared/data/lda_qa where they are. Rows that learn nothing: one mean
answer, the raw query, and a ridge regression. Students: document 001's transformer, trained on the
real queries alone and with made ones answered on the fly, and the hierarchical router, untrained
and trained.

Bars count the router on every teacher, the transformer on WordNet's: of lda_qa it is printed, but
192 questions are few for 3 million parameters.

The ablation holds H and L against each other at equal parameters (within 2 %): of the transformer
by the width of its feed-forward layers, of the router, which here has to learn all slots' places
from H L keys, by the rank of the slots' own corrections.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from bench._report import Figure, options, print_table, verdict
from bench.student_fidelity import load_pairs
from core.distill.answer_evaluation import (
    TEACHER,
    AnswerEvaluation,
    answer_maps,
    answers_of,
    evaluate_answers,
    mean_answer,
)
from core.distill.curriculum import training_data
from core.distill.evaluation import held_out, mapped, student_vectors
from core.distill.lda_fitting import fit
from core.distill.students._base import StudentModule, build_student
from core.distill.teachers.lda import LdaTeacher
from core.distill.training import TrainState, run_epochs
from core.specs.clusterings import Groups, KMeans
from core.specs.plain_students import HierarchicalRouter, ProjectionTransformer
from core.specs.students import Student
from core.specs.teachers import Lda
from core.specs.training import Training
from core.tensors.formats import Pairs
from core.tensors.shards import Array

THREADS, SEED = 2, 0
REAL_HEADS = 64
"""The case in which the transformer is trained on the real queries alone too."""
SOFT = 0.12
"""A temperature at which one answer for all has cosine 0.93: softer than what the fit chooses."""
WORDNET = Path("examples/wordnet")
QA = Path(__file__).resolve().parents[2] / "shared" / "data" / "lda_qa"
QA_FILE = "embeddings_minilm_l6_v2.npz"
UNTRAINED = "hierarchical router, step 0"
ROUTER = "hierarchical router, trained"
TRANSFORMER = "ProjectionTransformer, on the fly"
REAL_ONLY = "ProjectionTransformer, real queries alone"
MADE = Training(
    epochs=20,
    batch_size=256,
    learning_rate=1e-3,
    augment=0.75,
    augment_noise=1.0,
    warmup_steps=100,
    epochs_per_chunk=20,
)
"""Three made queries beside every real one."""
REAL = MADE.model_copy(update={"augment": 0.0, "augment_noise": None, "epochs": 80})
"""As many steps, on the real queries alone."""
GENTLE = Training(epochs=8, learning_rate=1e-3, augment=0.5, epochs_per_chunk=8)


@dataclass(frozen=True)
class Case:
    """One teacher, what its students say to held-out questions, and how long each trained."""

    name: str
    evaluation: AnswerEvaluation
    exactness: float
    """Largest entry of the untrained router's answers less the teacher's."""
    seconds: Mapping[str, float]


def main() -> int:
    """Judge every student of every teacher; print tables and the ablations."""
    parser = options(__doc__)
    parser.add_argument(
        "--data", type=Path, default=WORDNET, help="folder of embeddings.npz (default: %(default)s)"
    )
    parser.add_argument("--only", choices=("students", "ablation"), help="one part of both")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    pairs = load_pairs(args.data)
    if args.only == "ablation":
        _ablate(pairs)
        return 0
    cases = [_questions()] if (QA / QA_FILE).exists() else []
    if not cases:
        print(f"{QA_FILE}: not there, its rows are left out")
    cases += [_wordnet(pairs, heads, at) for heads, at in ((18, None), (64, None), (18, SOFT))]
    for case in cases:
        _print(case)
    if args.only is None:
        _ablate(pairs)
    return verdict("lda", *_figures(cases), check=args.check)


def _figures(cases: list[Case]) -> list[Figure]:
    """Bars over all teachers: the worst counts."""
    routers = [case.evaluation.row(ROUTER) for case in cases]
    wordnet = [case for case in cases if case.name.startswith("WordNet")]
    fly = [case.evaluation.row(TRANSFORMER) for case in wordnet]
    lost = [
        abs(case.evaluation.row(name).versus_teacher.difference)
        for case in wordnet
        for name in (ROUTER, TRANSFORMER)
    ]
    lost += [
        abs(case.evaluation.row(ROUTER).versus_teacher.difference)
        for case in cases
        if case not in wordnet
    ]
    return [
        Figure("router mean cosine", min(row.cosine_mean for row in routers), 0.9928),
        Figure("router min cosine", min(row.cosine_min for row in routers), 0.98),
        Figure("router std", max(row.cosine_std for row in routers), 0.01, at_most=True),
        Figure("router at step 0 off", max(c.exactness for c in cases), 1e-5, at_most=True),
        Figure("transformer mean cosine", min(row.cosine_mean for row in fly), 0.99),
        Figure("accuracy off the teacher's, points", 100 * max(lost), 1.0, at_most=True),
    ]


def _wordnet(pairs: Pairs, heads: int, temperature: float | None) -> Case:
    clustering = KMeans(max_clusters=heads)
    return _case(
        f"WordNet, N = {heads}",
        pairs,
        clustering,
        temperature=temperature,
        real_only=heads == REAL_HEADS,
    )


def _questions() -> Case:
    with np.load(QA / QA_FILE) as found:
        ids, of = found["cluster_ids"], found["query_cluster"].astype(np.int64)
        pairs = Pairs(
            ids=[f"question {row}" for row in range(len(of))],
            queries=found["query_embeddings"].astype(np.float32),
            targets=found["answer_embeddings"].astype(np.float32)[of],
            groups=[str(ids[at]) for at in of],
        )
    return _case("lda_qa, N = 30", pairs, Groups())


def _case(
    name: str,
    pairs: Pairs,
    clustering: KMeans | Groups,
    *,
    temperature: float | None = None,
    real_only: bool = False,
) -> Case:
    model = fit(pairs, clustering, seed=SEED, temperature=temperature)
    teacher = LdaTeacher(model, Lda())
    rows, dropped = held_out(pairs, model)
    queries = pairs.queries[rows].astype(np.float32)
    outputs = {
        each: mapped(function, queries)
        for each, function in answer_maps(teacher, seed=SEED).items()
    }
    untrained = build_student(HierarchicalRouter(), teacher, SEED)
    outputs[UNTRAINED] = student_vectors(untrained, queries)
    seconds: dict[str, float] = {}
    asked: list[tuple[str, Student, Training]] = [
        (ROUTER, HierarchicalRouter(), GENTLE),
        (TRANSFORMER, ProjectionTransformer(), MADE),
    ]
    if real_only:
        asked.append((REAL_ONLY, ProjectionTransformer(), REAL))
    for label, spec, training in asked:
        began = perf_counter()
        outputs[label] = student_vectors(_trained(spec, teacher, training), queries)
        seconds[label] = perf_counter() - began
        print(f"trained {label} in {seconds[label]:.0f} s", file=sys.stderr, flush=True)
    targets = pairs.targets.astype(np.float32)
    evaluation = evaluate_answers(
        outputs,
        targets[rows],
        answers_of(teacher, targets),
        mean=mean_answer(teacher),
        seed=SEED,
        dropped=dropped,
    )
    exactness = float(np.abs(outputs[UNTRAINED] - outputs[TEACHER]).max())
    return Case(f"{name} (temperature {model.temperature:g})", evaluation, exactness, seconds)


def _trained(spec: Student, teacher: LdaTeacher, training: Training) -> StudentModule:
    targets = teacher.targets(torch.from_numpy(teacher.queries))
    data = training_data(teacher, targets, training, seed=SEED)
    state = TrainState.start(build_student(spec, teacher, SEED), training, seed=SEED)
    run_epochs(state, data, 0, training.epochs, lambda done, total: None)
    return state.result()


def _print(case: Case) -> None:
    print(f"\n{case.name}: {case.evaluation.questions} held-out questions")
    print_table(
        ["", "cosine", "min", "std", "centred", "right", "- teacher, points", "trained, s"],
        [
            [
                row.name,
                f"{row.cosine_mean:.5f}",
                f"{row.cosine_min:.4f}",
                f"{row.cosine_std:.5f}",
                "-" if row.centred is None else f"{row.centred:.4f}",
                f"{row.accuracy:.4f}",
                f"{100 * row.versus_teacher.difference:+.2f}",
                f"{case.seconds[row.name]:.0f}" if row.name in case.seconds else "",
            ]
            for row in case.evaluation.rows
        ],
    )


def _ablate(pairs: Pairs) -> None:
    """Hold H and L against each other at equal parameters, on WordNet's 64 heads."""
    model = fit(pairs, KMeans(max_clusters=64), seed=SEED)
    teacher = LdaTeacher(model, Lda())
    rows, _ = held_out(pairs, model)
    queries = pairs.queries[rows].astype(np.float32)
    wanted = mapped(lambda asked: teacher.targets(asked), queries)
    shapes: dict[str, tuple[Student, Training]] = {
        f"transformer H = {h}, L = {layers}, ff {ff}": (
            ProjectionTransformer(num_heads=h, num_layers=layers, ff_dim=ff),
            MADE.model_copy(update={"epochs": 10}),
        )
        for h, layers, ff in ((2, 2, 512), (4, 2, 512), (8, 2, 512), (4, 1, 1411), (4, 3, 212))
    }
    shapes |= {
        f"router H = {h}, L = {levels}, own rank {rank}": (
            HierarchicalRouter(heads=h, levels=levels, own_rank=rank),
            GENTLE.model_copy(update={"epochs": 10}),
        )
        for h, levels, rank in ((64, 1, 0), (8, 2, 41), (4, 3, 45), (2, 6, 45))
    }
    table = []
    for name, (spec, training) in shapes.items():
        start = build_student(spec, teacher, SEED)
        found = student_vectors(_trained(spec, teacher, training), queries)
        table.append(
            [
                name,
                start.free_parameters(),
                f"{_cosine(student_vectors(start, queries), wanted):.5f}",
                f"{_cosine(found, wanted):.5f}",
            ]
        )
    print("\nAblation at equal parameters, WordNet, N = 64, 10 epochs")
    print_table(["", "parameters", "cosine, untrained", "trained"], table)


def _cosine(found: Array, wanted: Array) -> float:
    one, other = torch.from_numpy(found), torch.from_numpy(wanted)
    return float(torch.cosine_similarity(one, other).mean())


if __name__ == "__main__":
    sys.exit(main())
