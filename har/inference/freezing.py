"""A network's graph for inference, its weights frozen into it as constants.

Graphs are kept between processes: a change here or in `har.models.merging` that changes a graph
needs another `FORMAT` in `har.inference.graph_cache`.
"""

from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2


@dataclass(frozen=True, kw_only=True)
class FrozenGraph:
    """A graph whose weights are constants. `input` names an operation and `output` a tensor;
    `signature` is the input signature of its model.
    """

    graph_def: Any
    input: str
    output: str
    signature: Any


def compute_float32_in_full() -> None:
    """Switch TF32 off: A100, H100 and newer GPUs round float32's factors to ten bits by default,
    which changes features by a thousandth. The notebooks' P100 and T4 cannot do that.
    """
    tf.config.experimental.enable_tensor_float_32_execution(False)


def trace(model: Any, dtype: str) -> Any:
    """Trace Keras' inference on a batch of any size, of `dtype`, as one concrete function."""
    signature = [tf.TensorSpec(model.input_shape, dtype)]
    function = tf.function(lambda images: model(images, training=False), input_signature=signature)
    traced = function.get_concrete_function()
    # a graph refers to its variables weakly: it needs the model for as long as it is run
    traced.model = model
    return traced


def freeze(traced: Any) -> FrozenGraph:
    """Replace every read of a variable by a constant; nothing else changes.

    TensorFlow's own `convert_variables_to_constants_v2` also optimises the graph, which each run
    does again: 14 seconds for EfficientNetB7 where this takes one. It is still used where functions
    in the graph read variables, as Keras does for grouped convolutions on a CPU (Keras 3.15).
    """
    graph, signature = traced.graph, traced.structured_input_signature[0]
    captured = {placeholder.op.name: value for value, placeholder in graph.captures}
    variables = {id(variable.handle): variable for variable in graph.variables}
    original = graph.as_graph_def()
    handles = {name for name, value in captured.items() if value.dtype == tf.resource}
    if any(handles & set(node.input) for node in original.node if node.op != "ReadVariableOp"):
        traced = convert_variables_to_constants_v2(traced)
        original, captured = traced.graph.as_graph_def(), {}
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
        signature=signature,
    )


def compile_frozen(frozen: FrozenGraph) -> Any:
    """Build a function that runs the graph on its model's input."""

    def run(images: Any) -> Any:
        placed = {frozen.input: images}
        return tf.graph_util.import_graph_def(
            frozen.graph_def, input_map=placed, return_elements=[frozen.output], name=""
        )[0]

    return tf.function(run, input_signature=frozen.signature)
