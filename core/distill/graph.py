"""Builds ONNX graphs node by node: the same bytes every time, and nothing in them but the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from core.tensors.shards import Array

OPSET = 20
"""The first with Gelu; onnxruntime 1.17 and later run it."""
IR_VERSION = 9


class Graph:
    """Nodes and constants under construction. Names count up, so they never depend on a run."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Add a node; return its first output's name (the i-th further one ends in ``.i``)."""
        first = f"{self.prefix}{kind.lower()}_{len(self.nodes)}"
        names = [first, *(f"{first}.{index}" for index in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=first, **attributes))
        return first

    def constant(self, value: Tensor | Array | float) -> str:
        """Add a constant; return its name. Python numbers become float32 scalars."""
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy()
        array = np.float32(value) if isinstance(value, float) else np.asarray(value, order="C")
        name = f"{self.prefix}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def axes(self, *values: int) -> str:
        """Add an int64 list, as Squeeze, Slice and the reductions want it."""
        return self.constant(np.array(values, dtype=np.int64))

    def linear(self, layer: nn.Linear, x: str) -> str:
        """Apply a layer: x W^T + b."""
        product = self.op("MatMul", x, self.constant(layer.weight.T))
        bias = layer.bias
        return product if bias is None else self.op("Add", product, self.constant(bias))

    def norm(self, x: str) -> str:
        """Euclidean length of each row: [B, 1]."""
        return self.op("ReduceL2", x, self.axes(-1), keepdims=1)

    def scan(
        self, body: onnx.GraphProto, state: str, inputs: Sequence[str], *, backwards: bool
    ) -> str:
        """Fold ``body`` over the first axis of ``inputs``, last to first where ``backwards``."""
        return self.op(
            "Scan",
            state,
            *inputs,
            body=body,
            num_scan_inputs=len(inputs),
            scan_input_directions=[int(backwards)] * len(inputs),
        )

    def model(self, output: str, *, dim: int, width: int) -> bytes:
        """Serialise: input ``queries`` [batch, dim], output ``vectors`` [batch, width], float32."""
        self.nodes.append(helper.make_node("Identity", [output], ["vectors"], name="vectors"))
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
            for name, size in (("queries", dim), ("vectors", width))
        ]
        graph = helper.make_graph(
            self.nodes, "student", ends[:1], ends[1:], initializer=self.constants
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="stillroom",
        )
        onnx.checker.check_model(model)
        serialised: bytes = model.SerializeToString(deterministic=True)
        return serialised
