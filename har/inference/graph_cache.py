"""Graphs for serving, kept on disk: TensorFlow reads one in a tenth of a second, where building it
from a Keras file takes two seconds, most of them for Keras.

A graph from the cache runs only if it consists of arithmetic: TensorFlow has operations that read
and write files too.
"""

import json
import math
import os
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from har.util.files import (
    cache_folder,
    digest_bytes,
    digest_file,
    read_regular_file,
    replace_file,
)
from har.util.json_text import check_number, parse_json

if TYPE_CHECKING:
    from har.inference.freezing import FrozenGraph

# Part of each key: increase it when another graph is built from the same file.
FORMAT = 1
# The newest are kept.
MOST_GRAPHS = 8
MAX_BYTES = 150_000_000
MAX_SIZE = 4096
# What the networks of all backbones consist of.
ARITHMETIC = frozenset(
    {
        "Abs", "AddV2", "BatchMatMulV2", "BiasAdd", "Cast", "ConcatV2", "Const", "Conv2D",
        "DepthwiseConv2dNative", "Einsum", "Erf", "Erfc", "Exp", "ExpandDims", "GatherV2",
        "Identity", "IdentityN", "Less", "MatMul", "MaxPool", "Maximum", "Mean", "Mul", "Neg",
        "NoOp", "Pack", "Pad", "Placeholder", "Prod", "Range", "RealDiv", "Relu", "Relu6",
        "Reshape", "ReverseV2", "Rsqrt", "SelectV2", "Shape", "Sigmoid", "Sign", "Softmax", "Sqrt",
        "SquaredDifference", "Squeeze", "StopGradient", "StridedSlice", "Sub", "Sum", "Tanh",
        "Tile", "Transpose",
    }
)  # fmt: skip


def graphs_folder() -> Path:
    """The folder of the cached graphs, whether or not it exists."""
    return cache_folder() / "graphs"


def find_graph(model: Path) -> "FrozenGraph | None":
    """Return the graph that was kept for a Keras file, if there is one that can be used."""
    try:
        file = _file_of(model)
        found = _parse(read_regular_file(file, MAX_BYTES))
    # also whatever protobuf raises for a damaged file
    except Exception:
        return None
    # another's cache may be read alone
    with suppress(OSError):
        # it is the newest now
        os.utime(file)
    return found


def keep_graph(model: Path, graph: "FrozenGraph") -> None:
    """Keep the graph of a Keras file, if it may be kept. A full disk is no error, nor a user
    without a home, as a server in a container may be.
    """
    (images,) = graph.signature
    *_, size, _ = images.shape
    body = graph.graph_def.SerializeToString()
    facts = {"input": graph.input, "output": graph.output, "size": size, "dtype": images.dtype.name}
    data = json.dumps(facts | {"sha256": digest_bytes(body)}).encode() + b"\n" + body
    with suppress(OSError, ValueError, RuntimeError):
        _parse(data)
        (file := _file_of(model)).parent.mkdir(parents=True, exist_ok=True)
        with replace_file(file) as written:
            written.write(data)
        for old in sorted(graphs_folder().glob("*.graph"), key=os.path.getmtime)[:-MOST_GRAPHS]:
            old.unlink(missing_ok=True)


def clear_graphs() -> int:
    """Delete all graphs; return how many bytes that freed."""
    freed = 0
    for file in graphs_folder().glob("*.graph"):
        with suppress(OSError):
            size = file.stat().st_size
            file.unlink()
            freed += size
    return freed


def _file_of(model: Path) -> Path:
    parts = (FORMAT, digest_file(model), version("tensorflow"), version("keras"))
    return graphs_folder() / f"{digest_bytes(repr(parts).encode())[:32]}.graph"


def _parse(data: bytes) -> "FrozenGraph":
    """Parse what `keep_graph` wrote; a ValueError for what must not be run."""
    import tensorflow as tf

    from har.inference.freezing import FrozenGraph

    if len(data) > MAX_BYTES:
        raise ValueError("too large")
    head, _, body = data.partition(b"\n")
    facts = parse_json(head)
    if digest_bytes(body) != facts["sha256"]:
        raise ValueError("damaged")
    size = int(check_number(facts["size"], "size", 1, MAX_SIZE))
    graph = tf.compat.v1.GraphDef.FromString(body)
    _check_arithmetic(graph)
    images = tf.TensorSpec((None, size, size, 3), {"uint8": tf.uint8}[facts["dtype"]])
    names = str(facts["input"]), str(facts["output"])
    return FrozenGraph(graph_def=graph, input=names[0], output=names[1], signature=(images,))


def _check_arithmetic(graph: Any) -> None:
    if graph.library.function:
        raise ValueError("it has functions")
    for node in graph.node:
        if node.op not in ARITHMETIC:
            raise ValueError(f"{node.op} is no arithmetic")
        if node.op == "Const":
            value = node.attr["value"].tensor
            shape = [each.size for each in value.tensor_shape.dim]
            if min(shape, default=0) < 0 or math.prod(shape) > MAX_BYTES:
                raise ValueError("a constant is too large")
