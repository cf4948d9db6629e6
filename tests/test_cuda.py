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
import torch

import ferromoe.cuda
import gpu_check
from ferromoe import _selfcheck

SOURCE = Path(__file__).parents[1] / "cuda"
needs_kernels = pytest.mark.skipif(
    not ferromoe.cuda.kernels(), reason="this build has no CUDA kernels"
)


def build_emulator(folder: Path, *flags: str) -> Path:
    """Compile the driver that runs kernels on the host."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler to build the emulated driver with")
    library = folder / "libcuda.so"
    includes = ["-I", SOURCE / "device", "-I", SOURCE / "emulator"]
    source = SOURCE / "emulator" / "driver.cpp"
    flags = ("-std=c++17", "-O1", "-fPIC", "-shared", *flags)
    subprocess.run([compiler, *flags, *includes, source, "-o", library], check=True)
    return library


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver that most tests are about."""
    return build_emulator(tmp_path_factory.mktemp("emulator"))


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


def test_a_gpu_check_fails_what_is_no_number_or_another_shape() -> None:
    right = torch.ones(2)
    assert gpu_check.excess(right, right, right.double()) == 0
    assert gpu_check.excess(right * 1.1, right, right.double()) > 1
    assert gpu_check.excess(torch.tensor([1.0, float("nan")]), right, right.double()) > 1
    assert gpu_check.excess(right.view(1, 2), right, right.double()) > 1


@needs_kernels
def test_the_gpu_check_knows_every_kernel() -> None:
    names = {name for image in ferromoe.cuda.kernels() for name in image.kernels}
    assert set(gpu_check.Checks("cpu", []).table()) == names
    assert {name for listed in _selfcheck.KERNELS.values() for name in listed} == names


@needs_kernels
def test_the_gpu_check_runs_from_end_to_end(emulator: Path, tmp_path: Path) -> None:
    command = [sys.executable, gpu_check.__file__, "--emulator", "--output", tmp_path]
    environment = {**os.environ, "FERROMOE_LIBCUDA": str(emulator)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "bench" / "results" / "gpu" / "check-90.json").read_text())
    assert report["device"] == "ferromoe emulator"
    assert all(result["comparisons"] > 0 for result in report["results"].values())
    lines = (tmp_path / "cuda" / "verified.txt").read_text().splitlines()
    entries = [line.split() for line in lines if not line.startswith("#")]
    images = ferromoe.cuda.kernels()
    expected = [[name, "90", image.fingerprint] for image in images for name in image.kernels]
    assert entries == expected


def test_the_emulator_verifies_nothing_in_the_repository() -> None:
    command = [sys.executable, gpu_check.__file__, "--emulator"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "--output must be another folder" in run.stderr


def test_host_memory_goes_to_no_driver_but_the_emulator(tmp_path: Path) -> None:
    enter = "__import__('ferromoe').use_backend('emulator').__enter__()"
    assert ask(enter, "/nowhere/libcuda.so.1").startswith("RuntimeError: no NVIDIA driver")
    other = build_emulator(tmp_path, "-Demulator_pretend=another")
    assert ask(enter, other) == (
        'RuntimeError: use_backend: the driver must be the emulator for "emulator", got another; '
        "FERROMOE_LIBCUDA names it"
    )


@needs_kernels
def test_operations_on_an_emulated_gpu(emulator: Path) -> None:
    log = emulator.with_name("operations.log")
    script = Path(__file__).with_name("emulated_gpu.py")
    environment = {**os.environ, "FERROMOE_LIBCUDA": str(emulator), "EMULATOR_LOG": str(log)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
