"""Nodes that runtimes would join: biases into convolutions, sums over a count into means."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from mimicnorm_jax.export.onnx_graph.graph import Graph, Node

_WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")


def fuse(graph: Graph, outputs: list[str]) -> None:
    """Joins biases to what they are added to, and leaves out what nothing reads.

    Args:
      graph: is changed.
      outputs: names that are read from outside.
    """
    _prune(graph, outputs)
    uses = Counter(name for node in graph.nodes for name in node.inputs)
    uses.update(outputs)
    writers = {name: node for node in graph.nodes for name in node.outputs}
    for node in list(graph.nodes):
        if node.operator == "Add":
            _join_bias(graph, node, writers, uses)
    _prune(graph, outputs)


def _join_bias(graph: Graph, add: Node, writers: dict[str, Node], uses: Counter[str]) -> None:
    for name, other in (add.inputs, add.inputs[::-1]):
        writer = writers.get(name)
        joined = writer is not None and writer.operator in _WITH_BIAS and len(writer.inputs) == 2
        if writer is None or not joined or uses[name] != 1 or other not in graph.constants:
            continue
        bias = _bias(writer, graph.constants[other], graph.constants.get(writer.inputs[1]))
        if bias is None:
            continue
        # at the place of the addition, so that all that is read is written before
        inputs = [*writer.inputs, graph.constant(bias)]
        fused = dataclasses.replace(writer, inputs=inputs, outputs=add.outputs)
        graph.nodes[graph.nodes.index(add)] = fused
        writers[add.outputs[0]] = fused
        return


def _bias(writer: Node, array: np.ndarray, kernel: np.ndarray | None) -> np.ndarray | None:
    """The vector that an added constant is, one number a channel; else None."""
    if kernel is None:
        return None
    after = 0 if writer.operator == "Gemm" else kernel.ndim - 2
    channels = kernel.shape[0] if writer.operator == "Conv" else kernel.shape[1]
    if writer.operator == "ConvTranspose":
        channels *= writer.attributes["group"]
    shape = array.shape[1:] if array.ndim == after + 2 and array.shape[0] == 1 else array.shape
    if array.size == 1 and array.ndim <= after + 2:
        return np.full(channels, array.item(), array.dtype)
    if shape == (channels, *[1] * after):
        return array.reshape(channels)
    return None


def _prune(graph: Graph, outputs: list[str]) -> None:
    read, kept = set(outputs), []
    for node in reversed(graph.nodes):
        if read.intersection(node.outputs):
            kept.append(node)
            read.update(node.inputs)
    graph.nodes = kept[::-1]
    graph.constants = {name: array for name, array in graph.constants.items() if name in read}
