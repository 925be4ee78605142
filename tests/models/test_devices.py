"""Hardware by name, and what of a recipe it can run."""

from dataclasses import replace

import keras
import pytest
import tensorflow as tf

from har.models.devices import (
    Hardware,
    check_gpus,
    describe_unused_gpu,
    find_hardware,
    fit_to_hardware,
    format_hardware,
    precision_policy,
    short_name,
)
from har.recipe import V3, V4, VARIANTS
from har.util.errors import UserError


def hardware(*gpus: str, driver: str = "none") -> Hardware:
    return Hardware(
        gpu_names=gpus,
        compute_capabilities=("6.0",) * len(gpus),
        driver=driver,
        cpu="a CPU",
        cpu_count=2,
        memory_gb=24.0,
    )


CPU, P100, T4S = hardware(), hardware("Tesla P100-PCIE-16GB"), hardware("Tesla T4", "Tesla T4")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("Tesla P100-PCIE-16GB", "P100"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("", "GPU"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert short_name(name) == short


def test_tags_count_the_devices_in_use() -> None:
    assert format_hardware(CPU, 1) == "1xCPU"
    assert format_hardware(CPU, 2) == "2xCPU"
    assert format_hardware(P100, 1) == "1xP100"
    assert format_hardware(T4S, 2) == "2xT4"
    assert format_hardware(T4S, 1) == "1xT4"
    assert format_hardware(hardware("Tesla T4", "NVIDIA L4"), 2) == "1xT4+1xL4"
    assert (CPU.gpu_type, P100.gpu_type, T4S.gpu_type) == ("none", "P100", "T4")


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_gpu_everything_runs_as_asked(variant: str) -> None:
    assert fit_to_hardware(VARIANTS[variant], (), P100) == (VARIANTS[variant], [])


def test_without_a_gpu_what_the_variant_says_gives_way_with_a_warning() -> None:
    used, warnings = fit_to_hardware(V4, (), CPU)
    assert (used.backbone, used.precision) == ("efficientnet-lite0", "float32")
    assert warnings == [
        "no GPU: using backbone efficientnet-lite0 and precision float32"
        " (to insist: --backbone efficientnetb7 --precision mixed_float16)"
    ]
    assert fit_to_hardware(VARIANTS["v3"], {"backbone"}, CPU)[1] == []


def test_what_the_user_typed_is_obeyed() -> None:
    assert fit_to_hardware(V4, {"backbone", "precision"}, CPU) == (V4, [])
    from_file = replace(V3, weights="b7.h5")
    assert fit_to_hardware(from_file, {"weights"}, CPU) == (from_file, [])


def test_a_driver_without_cuda_libraries_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_unused_gpu(hardware(driver="580.95")) == []  # hidden on purpose, by conftest
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (line,) = describe_unused_gpu(hardware(driver="580.95"))
    assert "580.95" in line and "pip install 'tensorflow[and-cuda]'" in line
    assert describe_unused_gpu(CPU) == [] == describe_unused_gpu(hardware("Tesla T4", driver="580"))


def test_policy_is_put_back_even_on_an_error() -> None:
    with pytest.raises(RuntimeError), precision_policy("mixed_bfloat16"):
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
        raise RuntimeError
    assert keras.config.dtype_policy().name == "float32"


def test_this_machine_is_described() -> None:
    found = find_hardware()
    assert found.num_gpus == 0 and found.cpu and found.cpu_count >= 1 and found.memory_gb > 0.5


def test_a_gpu_without_code_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    (cpu, *_) = tf.config.list_logical_devices("CPU")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [cpu])
    check_gpus(P100)  # this one computes

    def fail(*_: object) -> None:
        raise tf.errors.InternalError(None, None, "CUDA_ERROR_NO_BINARY_FOR_GPU\nmore")

    monkeypatch.setattr(tf, "matmul", fail)
    with pytest.raises(
        UserError, match=r"Tesla P100-PCIE-16GB \(compute capability 6\.0\) but cannot"
    ) as it:
        check_gpus(P100)
    assert "CUDA_ERROR_NO_BINARY_FOR_GPU" in str(it.value) and "CUDA_VISIBLE_DEVICES=" in str(
        it.value
    )
    # where the CPU does the work, nothing is tried
    check_gpus(replace(P100, pretended=True))


def test_pretended_gpus_are_named_and_the_cpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAR_PRETEND_GPUS", "Tesla T4, Tesla T4")
    found = find_hardware()
    assert found.pretended and found.is_cpu and found.gpu_type == "T4"
    assert format_hardware(found, 2) == "2xT4" and format_hardware(found, 1) == "1xT4"
    used, _ = fit_to_hardware(VARIANTS["v4"], (), found)
    assert used.precision == "float32" and used.backbone == "efficientnet-lite0"
    (said,) = describe_unused_gpu(found)
    assert "computed by the CPU" in said
