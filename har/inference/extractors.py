"""The frozen backbone compiled to go over many images, by each runtime.

In float32, or as fast as the machine can: by the recipe's precision on a GPU, in bfloat16 on a
CPU that has it, which costs a hundredth of precision and halves the time.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from har.inference.runtimes import compile_tensorflow, convert_to_openvino, openvino_core
from har.models.backbones import build_backbone, copy_weights
from har.models.devices import has_gpu, precision_policy
from har.recipe import Recipe
from har.util.errors import UserError
from har.util.hardware import available_cpus, has_bfloat16

# OpenVINO computes several batches at once; small ones stay in the processor's caches: by four,
# EfficientNetB7 is 4 % faster than by eight in bfloat16, a tenth in float32.
BATCH_SIZES = {"tensorflow": 32, "openvino": 4}
# Of a runtime's features against Keras' own, as a relative distance.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
Images = npt.NDArray[np.float32]
Sink = Callable[[int, npt.NDArray[Any]], None]


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network compiled for going over many images.

    `run(batches, sink)` takes (first row, (batch, size, size, 3) float32 of 0..255) and gives
    (first row, (batch, features)), in any order and from any thread.
    """

    runtime: str
    arithmetic: str
    batch_size: int
    run: Callable[[Iterable[tuple[int, Images]], Sink], None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A network that a runtime can compile for an arithmetic; `converted` is the runtime's own
    form of it, None where that is Keras'.
    """

    compile: Callable[[str], Extractor]
    converted: Any = None


# Of a network, its trace in float32, and a recipe.
Prepare = Callable[[Any, Any, Recipe], Prepared]


def choose_arithmetic(runtime: str, recipe: Recipe, exact: bool) -> str:
    """float32 if exact; else the recipe's precision on a GPU, and bfloat16 where a CPU has it."""
    if exact:
        return "float32"
    if runtime == "tensorflow" and has_gpu():
        return recipe.precision.removeprefix("mixed_")
    return "bfloat16" if has_bfloat16() else "float32"


def prepare_tensorflow(network: Any, traced: Any, recipe: Recipe) -> Prepared:
    """By Keras' policies on a GPU; on a CPU one graph, that oneDNN computes in float32 or in
    bfloat16.
    """

    @cache
    def compile_under(policy: str) -> Any:
        plain = policy == "float32"
        model = network if plain else _under_policy(network, recipe, policy)
        return compile_tensorflow(model, "float32")

    def compile_network(arithmetic: str) -> Extractor:
        rewrite = arithmetic == "bfloat16" and not has_gpu()
        policy = "float32" if rewrite or arithmetic == "float32" else f"mixed_{arithmetic}"
        forward = compile_under(policy)

        def run(batches: Iterable[tuple[int, Images]], sink: Sink) -> None:
            def infer(start: int, images: Images) -> None:
                sink(start, forward(images).numpy())

            # at every call: without the option a function that was rewritten runs as it was
            with _onednn_bfloat16(rewrite):
                # on a CPU one batch's small steps fill what another's leave idle
                _run_in_threads(batches, 1 if has_gpu() else 2, lambda: infer)

        return Extractor(
            runtime="tensorflow",
            arithmetic=arithmetic,
            batch_size=BATCH_SIZES["tensorflow"],
            run=run,
        )

    return Prepared(compile=compile_network)


def _under_policy(network: Any, recipe: Recipe, policy: str) -> Any:
    """A network with the same weights that computes by another Keras policy."""
    with precision_policy(policy):
        # the weights are copied: no need to read them again
        copy = build_backbone(replace(recipe, weights="random"))
    copy_weights(network, copy)
    return copy


@contextmanager
def _onednn_bfloat16(wanted: bool) -> Iterator[None]:
    """Meanwhile TensorFlow may run graphs rewritten to bfloat16."""
    option = "auto_mixed_precision_onednn_bfloat16"
    tf.config.optimizer.set_experimental_options({option: wanted})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({option: False})


def prepare_openvino(network: Any, traced: Any, recipe: Recipe) -> Prepared:
    """Converted once; as many batches at once as the CPU has use for."""
    model = convert_to_openvino(traced)

    def compile_network(arithmetic: str) -> Extractor:
        options = {
            "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float32": "f32"}[arithmetic],
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": str(available_cpus()),
        }
        compiled = openvino_core().compile_model(model, "CPU", options)

        def run(batches: Iterable[tuple[int, Images]], sink: Sink) -> None:
            # one more than compute at once: none waits for Python to hand over images
            _run_in_threads(batches, available_cpus() + 1, lambda: _infer_into(compiled, sink))

        return Extractor(
            runtime="openvino",
            arithmetic=arithmetic,
            batch_size=BATCH_SIZES["openvino"],
            run=run,
        )

    return Prepared(compile=compile_network, converted=model)


def _infer_into(compiled: Any, sink: Sink) -> Callable[[int, Images], None]:
    """A request of OpenVINO's own, as a function that computes a batch and hands on its features.

    Not its queue of requests: that calls Python from OpenVINO's threads, and where the last such
    call is still returning while the network is freed, both wait for each other for ever (2026.4).
    """
    request = compiled.create_infer_request()

    def infer(start: int, images: Images) -> None:
        (found,) = request.infer([images], share_inputs=True, share_outputs=True).values()
        sink(start, found)

    return infer


def _run_in_threads(
    batches: Iterable[tuple[int, Images]],
    count: int,
    build_worker: Callable[[], Callable[[int, Images], None]],
) -> None:
    """Hand the batches out to `count` workers, each in a thread; all have ended afterwards.

    Raises:
        Exception: what the batches or a worker raised.
    """
    iterator, lock = iter(batches), threading.Lock()

    def work() -> None:
        worker = build_worker()
        while True:
            with lock:
                batch = next(iterator, None)
            if batch is None:
                return
            worker(*batch)

    with ThreadPoolExecutor(count) as pool:
        working = [pool.submit(work) for _ in range(count)]
    for each in working:
        each.result()


EXTRACTORS: dict[str, Prepare] = {
    "tensorflow": prepare_tensorflow,
    "openvino": prepare_openvino,
}


def check_extractor(
    extractor: Extractor, images: Images, expected: npt.NDArray[np.float32]
) -> None:
    """Raise a UserError unless it makes `expected` of `images`, as Keras does in float32."""
    found = np.empty_like(expected)

    def sink(start: int, features: npt.NDArray[Any]) -> None:
        found[start : start + len(features)] = features

    extractor.run([(0, images)], sink)
    distance = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not distance <= (allowed := TOLERANCE[extractor.arithmetic]):
        other = "tensorflow" if extractor.runtime == "openvino" else "openvino"
        raise UserError(
            f"runtime {extractor.runtime} ({extractor.arithmetic}) differs from Keras by"
            f" {distance:.2g} of the features' length, more than {allowed:g}: try --runtime {other}"
            " or --loader stream"
        )
