"""The graph as a model of onnx, the only place that needs it."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from mimicnorm_jax.errors import UserError, first_line
from mimicnorm_jax.export.onnx_graph.graph import Graph, Node
from mimicnorm_jax.export.onnx_graph.tensors import is_static
from mimicnorm_jax.version import __version__

_MOST_BYTES = 2**31 - 2**20  # a protobuf message, less what is around the constants
_IR_VERSION = 8  # what runtimes of opset 17 read

Described = tuple[str, tuple[Any, ...], np.dtype]  # name, shape and type


def import_onnx() -> Any:
    """Imports onnx.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        message = 'a model of ONNX needs onnx: pip install "mimicnorm-jax[export]"'
        raise UserError(message) from error


def build_model(
    graph: Graph, inputs: list[Described], outputs: list[str], described: list[Described]
) -> Any:
    """Builds and checks the model.

    Args:
      graph: nodes and constants.
      inputs: of the graph.
      outputs: the names of what it returns.
      described: what its outputs are called in the model.

    Raises:
      UserError: the constants take more than 2 GB.
    """
    onnx = import_onnx()
    size = sum(array.nbytes for array in graph.constants.values())
    if size > _MOST_BYTES:
        raise UserError(f"a file of ONNX holds at most 2 GB, and the constants take {size} bytes")
    _name_outputs(graph, outputs, [name for name, _, _ in described])
    helper = onnx.helper
    proto = helper.make_graph(
        [_node(helper, node) for node in graph.nodes],
        "mimicnorm_jax",
        [_value_info(helper, value) for value in inputs],
        [_value_info(helper, value) for value in described],
        [onnx.numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
    )
    opsets = [helper.make_opsetid("", graph.opset)]
    version = _IR_VERSION if graph.opset == 17 else helper.find_min_ir_version_for(opsets)
    model = helper.make_model(
        proto,
        opset_imports=opsets,
        ir_version=version,
        producer_name="mimicnorm-jax",
        producer_version=__version__,
    )
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker's and shape inference's own types
        raise UserError(f"onnx refuses the model: {first_line(error)}") from error
    return model


def _name_outputs(graph: Graph, outputs: list[str], names: list[str]) -> None:
    """Gives what the graph returns its names, through nodes where it has one already."""
    written = {name for node in graph.nodes for name in node.outputs}
    taken = {name for node in graph.nodes for name in (*node.inputs, *node.outputs)}
    taken |= set(graph.constants)
    new: dict[str, str] = {}
    for name, wanted in zip(outputs, names, strict=True):
        if wanted in taken:
            new.setdefault(wanted, graph.new_name(wanted))
        if name in written and name not in new and outputs.count(name) == 1:
            new[name] = wanted
        else:
            graph.nodes.append(Node("Identity", [name], [wanted], {}))
    _rename(graph, new, set(names))


def _rename(graph: Graph, new: dict[str, str], kept: set[str]) -> None:
    for node in graph.nodes:
        node.inputs = [new.get(name, name) for name in node.inputs]
        if node.operator != "Identity" or node.outputs[0] not in kept:
            node.outputs = [new.get(name, name) for name in node.outputs]
    graph.constants = {new.get(name, name): array for name, array in graph.constants.items()}


def _node(helper: Any, node: Node) -> Any:
    attributes = {
        name: helper.np_dtype_to_tensor_dtype(value) if isinstance(value, np.dtype) else value
        for name, value in node.attributes.items()
    }
    return helper.make_node(
        node.operator, node.inputs, node.outputs, name=node.outputs[0], **attributes
    )


def _value_info(helper: Any, described: Described) -> Any:
    name, shape, dtype = described
    extents = [int(extent) if is_static(extent) else str(extent) for extent in shape]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), extents)
