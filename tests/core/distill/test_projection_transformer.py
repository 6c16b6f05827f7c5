from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor, nn

from core.distill.graph import IR_VERSION, OPSET, Graph
from core.distill.students._base import Shown
from core.distill.students.projection_transformer import ProjectionTransformer, restore
from core.errors import SpecInvalid

DIM = 24


def make(*, seed: int = 0, **changes: Any) -> ProjectionTransformer:
    """A transformer whose every parameter has something to say."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"embed_dim": DIM, "num_heads": 4, "num_layers": 2, "ff_dim": 40}
    student = ProjectionTransformer(**sizes | changes)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    return student.eval()


def queries(rows: int = 9, dim: int = DIM) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(3))


def as_document_001(student: ProjectionTransformer, x: Tensor) -> Tensor:
    """The encoder itself, over a sequence of length 1."""
    answers: Tensor = student.output_proj(student.encoder(student.input_proj(x).unsqueeze(1))[:, 0])
    return answers


def run_onnx(student: ProjectionTransformer, x: Tensor) -> Tensor:
    graph = Graph()
    end = student.emit(graph, "queries")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in (("queries", student.config["dim"]), (end, student.config["target_dim"]))
    ]
    made = helper.make_graph(graph.nodes, "s", ends[:1], ends[1:], initializer=graph.constants)
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(made, opset_imports=opset, ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(np.asarray(session.run(None, {"queries": x.numpy()})[0]))


@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize("mode", [False, True])
@torch.no_grad()
def test_it_is_the_encoder_of_document_001(rows: int, mode: bool) -> None:  # noqa: FBT001
    student = make().train(mode)
    wanted = as_document_001(student, queries(rows)) if rows else torch.zeros(0, DIM)
    found = student(queries(rows))
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=1e-6, rtol=1e-5)


def test_training_and_use_give_the_same_numbers() -> None:
    student = make()
    assert torch.equal(student.train()(queries()), student.eval()(queries()))


def test_gradients_are_those_of_the_encoder() -> None:
    student, x = make().double().train(), queries().double()
    own = torch.autograd.grad(student(x).square().sum(), list(student.parameters()))
    encoders = torch.autograd.grad(
        as_document_001(student, x).square().sum(), list(student.parameters())
    )
    for (name, _), ours, theirs in zip(student.named_parameters(), own, encoders, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10), name


def test_the_number_of_heads_has_no_effect_over_one_key() -> None:
    one = make()
    for heads in (1, 2, 8, 24):
        other = make(num_heads=heads, seed=1)
        other.load_state_dict(one.state_dict())
        assert torch.equal(one(queries()), other(queries()))
        found = as_document_001(other, queries())
        assert torch.allclose(found, one(queries()), atol=1e-6)


def test_queries_and_keys_have_no_effect_and_are_not_counted_as_free() -> None:
    student = make()
    before = student(queries())
    with torch.no_grad():
        for layer in student._layers():
            layer.self_attn.in_proj_weight[: 2 * DIM] = 7.0
            layer.self_attn.in_proj_bias[: 2 * DIM] = -3.0
    assert torch.equal(student(queries()), before)
    idle = 2 * 2 * DIM * (DIM + 1)
    whole = sum(value.numel() for value in student.parameters())
    assert student.free_parameters() == whole - idle


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(0, 19), st.integers(0, 1000))
def test_rows_of_a_batch_never_see_each_other(rows: int, row: int, seed: int) -> None:
    student, row = make(), row % rows
    batch = queries(rows)
    others = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)) * 10
    others[row] = batch[row]
    assert torch.equal(student(batch)[row], student(others)[row])
    assert torch.allclose(student(batch[row : row + 1])[0], student(batch)[row], atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("out_dim", [None, 7, 60])
def test_onnx_says_what_torch_says(rows: int, out_dim: int | None) -> None:
    student = make(out_dim=out_dim)
    found, wanted = run_onnx(student, queries(rows)), student(queries(rows)).detach()
    assert found.shape == wanted.shape == (rows, out_dim or DIM)
    assert torch.allclose(found, wanted, atol=1e-5, rtol=0)


def test_config_is_json_and_brings_it_back() -> None:
    student = make(out_dim=5, dropout=0.25)
    again = restore(json.loads(json.dumps(student.config)))
    again.load_state_dict(student.state_dict())
    assert again.config == student.config
    assert torch.equal(again.eval()(queries()), student(queries()))
    assert student.config["name"] == "projection_transformer"
    assert (student.config["dim"], student.config["target_dim"]) == (DIM, 5)


def test_it_says_its_own_lengths_and_routes_nothing() -> None:
    student, x = make(), queries()
    none = torch.zeros(len(x), 0)
    routed = student.routed(Shown(x, none, none, torch.full((len(x), 1), -1)))
    assert routed.log_weights is None
    assert torch.equal(student.with_lengths(routed.vectors, x), student(x))
    flags = (student.takes_weights, student.takes_anchored, student.has_router)
    assert flags == (False, False, False)


def test_dropout_acts_in_training_alone() -> None:
    student = make(dropout=0.5)
    still = student(queries())
    assert torch.equal(student(queries()), still)
    student.train()
    assert not torch.equal(student(queries()), student(queries()))
    assert torch.equal(student.eval()(queries()), still)


def test_the_layers_are_document_001s() -> None:
    student = make()
    layer = student._layers()[0]
    assert isinstance(student.encoder, nn.TransformerEncoder)
    assert isinstance(layer, nn.TransformerEncoderLayer)
    assert layer.self_attn.batch_first
    assert not layer.norm_first
    assert ProjectionTransformer(DIM, 4, 3, 8).encoder.num_layers == 3


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"num_heads": 5}, "/num_heads"),
        ({"num_heads": 0}, "/num_heads"),
        ({"embed_dim": 0}, "/embed_dim"),
        ({"embed_dim": 2.0}, "/embed_dim"),
        ({"num_layers": 0}, "/num_layers"),
        ({"ff_dim": -1}, "/ff_dim"),
        ({"out_dim": 0}, "/out_dim"),
        ({"dropout": 1.0}, "/dropout"),
        ({"dropout": float("nan")}, "/dropout"),
        ({"dropout": True}, "/dropout"),
    ],
)
def test_wrong_sizes_are_named(changes: dict[str, Any], pointer: str) -> None:
    with pytest.raises(SpecInvalid, match=pointer[1:]) as caught:
        make(**changes)
    assert caught.value.pointer == pointer


@pytest.mark.parametrize("out_dim", [None, 100])
def test_untrained_answers_are_about_unit_long(out_dim: int | None) -> None:
    torch.manual_seed(0)
    student = ProjectionTransformer(256, 4, 2, 64, out_dim=out_dim)
    lengths = student(queries(50, 256)).detach().norm(dim=1)
    assert 0.8 < float(lengths.mean()) < 1.2
