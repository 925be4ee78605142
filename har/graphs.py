"""A network's inference as a TensorFlow graph: traced, and with its weights frozen into it."""

from dataclasses import dataclass
from typing import Any

import tensorflow as tf


@dataclass(frozen=True, kw_only=True)
class FrozenGraph:
    """A graph whose weights are constants; `input` names an operation, `output` a tensor;
    `signature` is what its model takes.
    """

    graph_def: Any
    input: str
    output: str
    signature: Any


def compute_float32_in_full() -> None:
    """Have no GPU round float32's factors to ten bits (TF32), which A100, H100 and newer do unless
    told otherwise: features differ by a thousandth then. The notebooks' P100 and T4 cannot.
    """
    tf.config.experimental.enable_tensor_float_32_execution(False)


def trace(model: Any, dtype: str) -> Any:
    """Keras' inference on a batch of any size, of `dtype`, as one concrete function."""
    signature = [tf.TensorSpec(model.input_shape, dtype)]
    function = tf.function(lambda images: model(images, training=False), input_signature=signature)
    traced = function.get_concrete_function()
    # a graph refers to its variables weakly: it needs the model for as long as it is run
    traced.model = model
    return traced


def run_once(traced: Any, images: Any) -> Any:
    """What it computes of `images`, the graph not optimised before: that takes as long as the
    computing (EfficientNetB7, eight images).
    """
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    try:
        return traced(images).numpy()
    finally:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


def freeze(traced: Any) -> FrozenGraph:
    """Every read of a variable becomes a constant, and nothing else changes.

    TensorFlow's own `convert_variables_to_constants_v2` also optimises the graph, which every run
    of it does again: for EfficientNetB7 14 seconds where this takes one.
    """
    graph = traced.graph
    captured = {placeholder.op.name: value for value, placeholder in graph.captures}
    variables = {id(variable.handle): variable for variable in graph.variables}
    original = graph.as_graph_def()
    frozen = tf.compat.v1.GraphDef(versions=original.versions, library=original.library)
    for node in original.node:
        if node.op == "ReadVariableOp" and node.input[0] in captured:
            value = variables[id(captured[node.input[0]])]
        elif node.name not in captured:
            frozen.node.add().CopyFrom(node)
            continue
        elif (value := captured[node.name]).dtype == tf.resource:
            continue
        constant = frozen.node.add(name=node.name, op="Const")
        constant.attr["dtype"].type = value.dtype.as_datatype_enum
        constant.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value.numpy()))
    return FrozenGraph(
        graph_def=frozen,
        input=traced.inputs[0].op.name,
        output=traced.outputs[0].name,
        signature=traced.structured_input_signature[0],
    )


def compile_frozen(frozen: FrozenGraph) -> Any:
    """The graph as a function of what its model took."""

    def run(images: Any) -> Any:
        placed = {frozen.input: images}
        return tf.graph_util.import_graph_def(
            frozen.graph_def, input_map=placed, return_elements=[frozen.output], name=""
        )[0]

    return tf.function(run, input_signature=frozen.signature)
