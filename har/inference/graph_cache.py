"""Graphs for serving, kept on disk: TensorFlow reads one in a tenth of a second, where building it
from a Keras file takes two seconds, most of them for Keras.

A graph from the cache runs only if it consists of arithmetic: TensorFlow has operations that read
and write files too.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

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
MAX_HEAD_BYTES = 1000
MAX_SIZE = 4096
# A file that is being written is younger.
UNFINISHED_S = 3600
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


def find_key(model: Path) -> str:
    """Return what a Keras file's graph is kept under. Ask before the file is read: it may be
    replaced meanwhile.
    """
    parts = (FORMAT, digest_file(model), tensorflow_version(), version("keras"))
    return digest_bytes(repr(parts).encode())[:32]


def tensorflow_version() -> str:
    """Return the version of TensorFlow, by whatever name it was installed."""
    import tensorflow as tf

    return str(tf.__version__)


def find_graph(key: str) -> "FrozenGraph | None":
    """Return the graph that was kept under a key, if there is one that can be used."""
    try:
        file = _file_of(key)
        found = _parse(read_regular_file(file, MAX_BYTES))
    # also whatever protobuf raises for a damaged file
    except Exception:
        return None
    # another's cache may be read alone
    with suppress(OSError):
        # it is the newest now
        os.utime(file)
    return found


def keep_graph(key: str, graph: "FrozenGraph") -> None:
    """Keep a graph, if it may be kept. A full disk is no error, nor a user without a home, as a
    server in a container may be.
    """
    with suppress(OSError, ValueError, RuntimeError):
        _check_arithmetic(graph.graph_def)
        if graph.graph_def.ByteSize() > MAX_BYTES - MAX_HEAD_BYTES:
            return
        (file := _file_of(key)).parent.mkdir(parents=True, exist_ok=True)
        with replace_file(file) as written:
            _write(graph, written)
        kept = sorted(graphs_folder().glob("*.graph"), key=os.path.getmtime)
        for old in (*kept[:-MOST_GRAPHS], *_find_unfinished()):
            old.unlink(missing_ok=True)


def _write(graph: "FrozenGraph", file: IO[bytes]) -> None:
    (images,) = graph.signature
    *_, size, _ = images.shape
    body = graph.graph_def.SerializeToString()
    facts = {"input": graph.input, "output": graph.output, "size": size, "dtype": images.dtype.name}
    file.write(json.dumps(facts | {"sha256": digest_bytes(body)}).encode() + b"\n")
    file.write(body)


def _find_unfinished() -> Iterator[Path]:
    """Find what processes that were killed left."""
    for file in graphs_folder().glob(".*.graph.*"):
        if time.time() - file.stat().st_mtime > UNFINISHED_S:
            yield file


def clear_graphs() -> int:
    """Delete all graphs; return how many bytes that freed."""
    freed = 0
    for file in (*graphs_folder().glob("*.graph"), *graphs_folder().glob(".*.graph.*")):
        with suppress(OSError):
            size = file.stat().st_size
            file.unlink()
            freed += size
    return freed


def _file_of(key: str) -> Path:
    return graphs_folder() / f"{key}.graph"


def _parse(data: bytes) -> "FrozenGraph":
    """Parse what `_write` wrote; a ValueError for what must not be run."""
    import tensorflow as tf

    from har.inference.freezing import FrozenGraph

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
