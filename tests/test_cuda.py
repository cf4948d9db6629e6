"""What `ferromoe.cuda` says of driver, GPUs and kernels, on machines without a GPU.

The driver is the emulator, or something that is none; each case is a process of its own, since a
process starts its driver once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ferromoe.cuda
import gpu_check

SOURCE = Path(__file__).parents[1] / "cuda"
needs_kernels = pytest.mark.skipif(
    not ferromoe.cuda.kernels(), reason="this build has no CUDA kernels"
)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the driver that runs kernels on the host."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler to build the emulated driver with")
    library = tmp_path_factory.mktemp("emulator") / "libcuda.so"
    includes = ["-I", SOURCE / "device", "-I", SOURCE / "emulator"]
    source = SOURCE / "emulator" / "driver.cpp"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared"]
    subprocess.run([compiler, *flags, *includes, source, "-o", library], check=True)
    return library


def ask(expression: str, driver: Path | str, **settings: int | Path) -> Any:
    """Evaluate an expression on `cuda` with `driver` for NVIDIA's; an error gives its text."""
    code = f"""
import json, ferromoe.cuda as cuda
try:
    answer = {expression}
except RuntimeError as error:
    answer = f"RuntimeError: {{error}}"
print(json.dumps(answer))
"""
    environment = {f"EMULATOR_{name.upper()}": str(value) for name, value in settings.items()}
    environment = {**os.environ, "FERROMOE_LIBCUDA": str(driver), **environment}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@needs_kernels
def test_a_usable_driver_is_found_and_its_gpus_are_listed(emulator: Path) -> None:
    facts = "cuda.is_available(), cuda.why_not(), cuda.device_info()"
    available, why_not, devices = ask(facts, emulator, devices=2, cc=89)
    assert (available, why_not) == (True, None)
    assert devices == [["ferromoe emulator", [8, 9], 4, 1 << 30]] * 2


def test_a_missing_driver_is_the_reason() -> None:
    available, why_not, devices = ask(
        "cuda.is_available(), cuda.why_not(), cuda.device_info()", "/nowhere/libcuda.so.1"
    )
    assert not available
    assert why_not.startswith("no NVIDIA driver is installed: ")
    assert "/nowhere/libcuda.so.1" in why_not
    assert devices == []


def test_a_driver_that_lacks_a_function_is_the_reason() -> None:
    # Any library but a driver.
    why_not = ask("cuda.why_not()", "libc.so.6")
    assert why_not.startswith("libc.so.6 lacks cu")
    assert why_not.endswith("version 580 or later")


def test_an_old_driver_is_the_reason(emulator: Path) -> None:
    why_not = ask("cuda.why_not()", emulator, version=12080)
    assert why_not == (
        "the NVIDIA driver supports CUDA 12.8, which makes it older than 580: the kernels need a "
        "driver of version 580 or later (CUDA 13.0)"
    )


def test_a_driver_without_a_gpu_is_the_reason(emulator: Path) -> None:
    why_not = ask("cuda.why_not()", emulator, init=100)
    assert why_not == (
        "the NVIDIA driver does not start: CUDA error 100, CUDA_ERROR_NO_DEVICE: said by the "
        "emulator"
    )
    assert ask("cuda.why_not()", emulator, devices=0) == "the NVIDIA driver shows no GPU"


@needs_kernels
def test_warming_up_finds_every_kernel_and_loads_an_image_once(emulator: Path) -> None:
    log = emulator.with_name("warmup.log")
    assert ask("[cuda.warmup(), cuda.warmup()]", emulator, log=log) == [None, None]
    assert log.read_text() == "device 0 load\n" * len(ferromoe.cuda.kernels())


@needs_kernels
def test_a_gpu_that_is_too_old_is_named(emulator: Path) -> None:
    assert ask("cuda.warmup()", emulator, cc=75) == (
        "RuntimeError: ferromoe emulator has compute capability 7.5, the kernels need 8.0 or later"
    )


def test_a_device_number_out_of_range_is_an_error(emulator: Path) -> None:
    error = ask("cuda.warmup(7)", emulator)
    assert error.startswith(
        "RuntimeError: CUDA device 7: CUDA error 101, CUDA_ERROR_INVALID_DEVICE"
    )
    assert ask("cuda.warmup(-1)", emulator) == (
        "RuntimeError: CUDA device must lie in 0..31, got -1"
    )


def test_importing_loads_no_driver(emulator: Path) -> None:
    loaded = f"{str(emulator)!r} in open('/proc/self/maps').read()"
    assert ask(f"[{loaded}, cuda.device_info() and {loaded}]", emulator) == [False, True]


@needs_kernels
def test_an_image_tells_its_targets_and_kernels() -> None:
    image = next(image for image in ferromoe.cuda.kernels() if image.name == "permute")
    assert {"80", "90"} <= set(image.archs.split())
    assert image.size > 0
    assert "permute_rows" in image.kernels


def test_only_kernels_of_this_build_count_as_verified() -> None:
    names = [name for image in ferromoe.cuda.kernels() for name in image.kernels]
    assert set(ferromoe.cuda.verified()) <= set(names)


def test_a_gpu_check_replaces_the_entries_of_its_own_compute_capability() -> None:
    listed = "# kernel capability fingerprint\nfirst 80 aa\nfirst 90 bb\nsecond 90 cc\n"
    assert gpu_check.updated(listed, "90", [("first", "dd")]) == (
        "# kernel capability fingerprint\nfirst 80 aa\nfirst 90 dd\n"
    )


@needs_kernels
def test_the_gpu_check_knows_every_kernel() -> None:
    names = {name for image in ferromoe.cuda.kernels() for name in image.kernels}
    assert set(gpu_check.checks()) == names


@needs_kernels
def test_arrays_on_a_gpu_go_through_the_kernels(emulator: Path) -> None:
    log = emulator.with_name("arrays.log")
    script = Path(__file__).with_name("emulated_gpu.py")
    environment = {**os.environ, "FERROMOE_LIBCUDA": str(emulator), "EMULATOR_LOG": str(log)}
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    launches = [line.split()[2] for line in log.read_text().splitlines() if "grid" in line]
    assert launches == ["permute_rows", "unpermute_f32", "unpermute_backward_f32"]
