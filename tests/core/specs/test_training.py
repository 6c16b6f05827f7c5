"""A curriculum's stages, chunks and temperatures, and which weights of the loss are in force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from core.errors import SpecInvalid
from core.specs.loss_checks import check_losses
from core.specs.losses import DEFAULTS, Compares, Losses
from core.specs.plain_students import Hierarchical, Linear
from core.specs.schedules import SCHEDULE_TYPES
from core.specs.sizes import Sizes
from core.specs.training import Training


@st.composite
def curricula(draw: st.DrawFn) -> Training:
    epochs = draw(st.integers(1, 60))
    stages = draw(st.integers(1, min(epochs, 12)))
    told = {"stages": stages, "schedule": draw(st.sampled_from(SCHEDULE_TYPES))}
    return Training.model_validate(
        {
            "epochs": epochs,
            "epochs_per_chunk": draw(st.integers(1, 70)),
            "curriculum": draw(st.sampled_from([None, told])),
        }
    )


@given(curricula())
def test_chunks_partition_the_epochs_and_never_cross_a_stage(training: Training) -> None:
    blocks = training.epoch_blocks()

    shown = [epoch for first, last in blocks for epoch in range(first, last)]
    assert shown == list(range(training.epochs))
    assert all(0 < last - first <= training.epochs_per_chunk for first, last in blocks)
    for first, last in blocks:
        assert len({training.stage_of(epoch) for epoch in range(first, last)}) == 1
    ends = [epoch for epoch in range(-1, training.epochs + 2) if training.ends_stage(epoch)]
    assert set(ends) <= {last for _, last in blocks}
    assert len(ends) == (0 if training.curriculum is None else training.curriculum.stages)


@given(curricula())
def test_stages_are_of_like_length_and_temperatures_go_from_end_to_end(training: Training) -> None:
    stages = [training.stage_of(epoch) for epoch in range(training.epochs)]
    taus = [training.tau_of(epoch) for epoch in range(training.epochs)]

    if training.curriculum is None:
        assert set(stages) == {0}
        assert set(taus) == {1.0}
        return
    counts = [stages.count(stage) for stage in range(training.curriculum.stages)]
    assert stages == sorted(stages)
    assert max(counts) - min(counts) <= 1
    assert taus[-1] == 0.5
    assert taus == sorted(taus, reverse=True)
    assert taus[0] == 4.0 or training.curriculum.stages == 1
    assert training.tau_of(training.epochs) == 0.5, "after the end it is the last stage's"


def test_without_a_curriculum_there_is_the_one_temperature_that_is_told() -> None:
    assert Training(tau=2.5).tau_of(0) == Training(tau=2.5).tau_of(7) == 2.5


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"epochs": 4, "curriculum": {"stages": 5}}, r"stages 5 of 4 epochs; allowed: 1 to 4"),
        ({"tau": 2.0, "curriculum": {}}, "tau 2 beside a curriculum"),
        ({"checkpoint_interval": 9, "curriculum": {}}, "checkpoint_interval 9 beside a curriculum"),
        ({"curriculum": {"stages": 0}}, "greater than or equal to 1"),
        ({"curriculum": {"start_tau": 0}}, "greater than or equal to 0.000001"),
        ({"curriculum": {"schedule": "step"}}, "'linear', 'exponential' or 'cosine'"),
        ({"curriculum": {"order": "hard_first"}}, "'shuffled' or 'easy_first'"),
        ({"batch_size": 4, "accumulate": 5}, "accumulate 5 of batch_size 4: a part needs a row"),
        ({"accumulate": 0}, "greater than or equal to 1"),
        ({"augment": 0, "augment_noise": 0.2}, "augment_noise 0.2 with augment 0"),
        ({"tau": 0}, "greater than or equal to 0.000001"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    told: dict[str, object], match: str
) -> None:
    with pytest.raises(ValidationError, match=match):
        Training.model_validate(told)


@pytest.mark.parametrize("compares", DEFAULTS)
@pytest.mark.parametrize("has", [True, False])
def test_null_means_the_terms_that_the_student_has(compares: Compares, *, has: bool) -> None:
    found = Losses().weights(compares, routes=has, decodes=has)

    wanted = dict(DEFAULTS[compares])
    if not has:
        wanted = {n: w for n, w in wanted.items() if n not in ("router_kl", "reconstruction")}
    assert found == wanted


def test_a_zero_leaves_a_term_out_and_others_join_the_default() -> None:
    told = Losses(mse=0, gram=2.0, custom={"mine": 0.5, "other": 0.0})

    found = told.weights("vectors", routes=False, decodes=False)

    assert found == {"cosine": 0.7, "gram": 2.0, "mine": 0.5}
    assert told.told() == {"mse": 0.0, "gram": 2.0, "mine": 0.5, "other": 0.0}


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"custom": {"mine": -1.0}}, "custom.mine -1; allowed: 0 to 1e6"),
        ({"custom": {"mse": 1.0}}, "custom.mse 1: say losses.mse, which is the same"),
        ({"custom": {f"term{number}": 1.0 for number in range(17)}}, "at most 16"),
        ({"cosine": 1e7}, "less than or equal to 1000000"),
        (dict.fromkeys(set(Losses.model_fields) - {"custom"}, 0.0), "all weights are 0"),
    ],
)
def test_weights_that_mean_nothing_are_refused(told: dict[str, object], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        Losses.model_validate(told)


def test_a_temperature_of_a_term_of_ones_own_needs_that_term_to_weigh_something() -> None:
    sizes, linear = Sizes(12, 12, 100), Linear()
    told = {"tau": 2.0, "losses": {"custom": {"mine": 1.0}}}
    check_losses(Training.model_validate(told), linear, sizes)
    told["losses"] = {"custom": {"mine": 0.0}}
    with pytest.raises(SpecInvalid, match="no term of the loss has a temperature"):
        check_losses(Training.model_validate(told), linear, sizes)


def test_easy_rows_first_need_no_temperature() -> None:
    easy = Training.model_validate({"curriculum": {"order": "easy_first"}})
    check_losses(easy, Linear(), Sizes(12, 12, 100))


@pytest.mark.parametrize(
    ("levels", "weights", "match"),
    [
        ((5, 5), (0.5, 0.5), "longer than the one before"),
        ((25, 5), (0.5, 0.5), "longer than the one before"),
        ((5,), (0.7, 0.3), "2 entries for 1 levels"),
        ((), (), "at least 1 item"),
    ],
)
def test_levels_are_nested_and_each_weighed(
    levels: tuple[int, ...], weights: tuple[float, ...], match: str
) -> None:
    with pytest.raises(ValidationError, match=match):
        Hierarchical(levels=levels, level_weights=weights)
