"""Kernels on several threads: same bits, forks, concurrent callers, panics."""

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ferromoe
from ferromoe import _core

TOKENS, HIDDEN, TOP_K = 700, 516, 3
"""Enough rows that every kernel wants several threads, of a width that divides nothing."""


@pytest.fixture(autouse=True)
def _restore_counts() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    ferromoe.set_num_threads(None)


def plan_and_rows() -> tuple[ferromoe.Dispatch, Tensor, Tensor]:
    """Sort random slots; a fifth of them chose no expert."""
    generator = torch.Generator().manual_seed(7)
    slots = torch.randperm(TOKENS * TOP_K, generator=generator)[: TOKENS * TOP_K * 4 // 5]
    slot_of_row = torch.full((TOKENS * TOP_K,), -1, dtype=torch.int32)
    slot_of_row[: len(slots)] = slots.int()
    row_of_slot = torch.full((TOKENS * TOP_K,), -1, dtype=torch.int32)
    row_of_slot[slots] = torch.arange(len(slots), dtype=torch.int32)
    offsets = torch.tensor([0, len(slots)], dtype=torch.int32)
    plan = ferromoe.Dispatch(offsets, slot_of_row, row_of_slot.view(TOKENS, TOP_K))
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    return plan, x, torch.rand(TOKENS, TOP_K, generator=generator)


def there_and_back() -> list[Tensor]:
    """Run three kernels, each of them large enough for several threads."""
    plan, x, weights = plan_and_rows()
    x.requires_grad_()
    y = ferromoe.permute(x, plan)
    out = ferromoe.unpermute(y, plan, weights)
    out.sin().sum().backward()
    assert x.grad is not None
    return [y.detach(), out.detach(), x.grad]


HELPERS = """
def in_child(work):
    import os, signal, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork, from Python 3.12
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # a hang ends the child, and the test fails
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"the child ended with {code}"

def thread_names():
    import pathlib
    return {p.read_text().strip() for p in pathlib.Path("/proc/self/task").glob("*/comm")}
"""


def run_python(script: str, **environment: str) -> str:
    """Run a script in a process of its own, which is killed if it hangs."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    clean = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", HELPERS + textwrap.dedent(script)],
        env=clean | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_same_bits_for_any_number_of_threads() -> None:
    results = {}
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert ferromoe.get_num_threads() == threads
        results[threads] = there_and_back()
    with ferromoe.use_backend("reference"):
        expected = there_and_back()
    for result in results.values():
        for got, one, reference in zip(result, results[1], expected, strict=True):
            assert torch.equal(got, one)
            torch.testing.assert_close(got, reference)


def test_own_pool_gives_the_same_bits() -> None:
    """NumPy only, so that the process has no team of torch's."""
    script = """
        import sys, zlib
        import numpy as np
        import ferromoe
        rng = np.random.default_rng(0)
        slots = rng.permutation(2100).astype(np.int32)
        rows = np.argsort(slots).astype(np.int32).reshape(700, 3)
        plan = ferromoe.Dispatch(np.array([0, 2100], np.int32), slots, rows)
        x = rng.standard_normal((700, 516), np.float32)
        w = rng.random((700, 3), np.float32)
        for threads in (1, 2, 3, 8):
            ferromoe.set_num_threads(threads)
            assert ferromoe.get_num_threads() == threads
            y = ferromoe.permute(x, plan)
            assert (y == x[slots // 3]).all()
            print(zlib.crc32(ferromoe.unpermute(y, plan, w)))
        assert "torch" not in sys.modules
        assert ferromoe._core.thread_team() == "own pool"
    """
    assert len(set(run_python(script).split())) == 1


def test_counts_come_from_the_call_then_the_environment() -> None:
    script = """
        import ferromoe
        print(ferromoe.get_num_threads())
        ferromoe.set_num_threads(2)
        print(ferromoe.get_num_threads())
        ferromoe.set_num_threads(None)
        print(ferromoe.get_num_threads())
    """
    processors = str(len(os.sched_getaffinity(0)))
    for environment, expected in [
        ({"FERROMOE_NUM_THREADS": "5", "OMP_NUM_THREADS": "7"}, "5"),
        ({"OMP_NUM_THREADS": "7,2"}, "7"),
        ({"OMP_NUM_THREADS": "all"}, processors),
        ({}, processors),
    ]:
        assert run_python(script, **environment).split() == [expected, "2", expected]


@pytest.mark.parametrize("n", [0, -3])
def test_a_count_below_one_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"set_num_threads: n must be at least 1, .* got {n}"):
        ferromoe.set_num_threads(n)


@pytest.mark.skipif(sys.platform != "linux", reason="torch has libgomp on Linux only")
def test_torch_counts_are_followed_and_capped() -> None:
    there_and_back()
    assert _core.use_torch_team()
    assert _core.thread_team() == "torch's OpenMP"
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert ferromoe.get_num_threads() == threads
        # OpenMP keeps the count per thread; a new one must not start from the machine's.
        seen: list[int] = []
        thread = threading.Thread(target=lambda seen=seen: seen.append(ferromoe.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [threads]
    ferromoe.set_num_threads(2)
    assert ferromoe.get_num_threads() == 2
    torch.set_num_threads(1)
    assert ferromoe.get_num_threads() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="torch has libgomp on Linux only")
def test_a_team_smaller_than_asked_for() -> None:
    script = """
        import torch
        import test_threads as t
        torch.set_num_threads(1)
        expected = t.there_and_back()
        torch.set_num_threads(6)
        assert t.ferromoe.get_num_threads() == 6
        assert all(map(torch.equal, expected, t.there_and_back()))
        assert t._core.thread_team() == "torch's OpenMP"
    """
    run_python(script, OMP_THREAD_LIMIT="2")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_forked_children_of_torch_use_their_own_pool() -> None:
    script = """
        import torch
        import test_threads as t
        torch.set_num_threads(2)
        assert "ferromoe-1" not in thread_names()
        expected = t.there_and_back()
        assert "ferromoe-1" not in thread_names(), "the parent works on torch's team"

        def work():  # which keeps to our loops: torch's own hang here
            y = t.ferromoe.permute(x, plan)
            out = t.ferromoe.unpermute(y, plan, weights)
            assert out.numpy().tobytes() == expected[1].numpy().tobytes()
            return t._core.thread_team() == "own pool" and "ferromoe-1" in thread_names()

        plan, x, weights = t.plan_and_rows()
        in_child(work)
        in_child(lambda: t._core.use_torch_team() is False and work())
        again = t.there_and_back()
        assert all(map(torch.equal, expected, again)), "the parent goes on as before"
    """
    run_python(script)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_that_inherited_torch_and_loads_us_later() -> None:
    script = """
        import torch
        torch.set_num_threads(2)
        tokens = torch.rand(1000, 500) + 1  # large enough for torch's team

        def work():  # which keeps to our loops: torch's own hang here
            import ferromoe
            slots = torch.arange(3000, dtype=torch.int32)
            plan = ferromoe.Dispatch(slots[:2], slots, slots.view(1000, 3))
            y = ferromoe.permute(tokens, plan).numpy()
            assert (y == tokens.numpy().repeat(3, axis=0)).all()
            return ferromoe._core.thread_team() == "own pool"

        in_child(work)
    """
    run_python(script)


@pytest.mark.skipif(sys.platform != "linux", reason="os.fork")
def test_the_own_pool_is_built_anew_in_children_and_grandchildren() -> None:
    script = """
        import numpy as np
        import ferromoe
        ferromoe.set_num_threads(3)
        slots = np.arange(3000, dtype=np.int32)
        plan = ferromoe.Dispatch(slots[:2], slots, slots.reshape(1000, 3))
        x = np.random.default_rng(0).standard_normal((1000, 500), np.float32)

        def work():
            y = ferromoe.permute(x, plan)
            return bool((y == x[slots // 3]).all()) and "ferromoe-2" in thread_names()

        assert "ferromoe-1" not in thread_names(), "nothing starts at import"
        assert work()
        in_child(lambda: work() and in_child(work) is None)
        assert work()
    """
    run_python(script)


def test_python_threads_at_once() -> None:
    expected = there_and_back()

    with ThreadPoolExecutor(3) as threads:
        for result in threads.map(lambda _: there_and_back(), range(30)):
            for got, want in zip(result, expected, strict=True):
                assert torch.equal(got, want)


def test_python_threads_at_once_on_the_own_pool() -> None:
    script = """
        import numpy as np
        import ferromoe
        from concurrent.futures import ThreadPoolExecutor
        ferromoe.set_num_threads(2)
        slots = np.arange(3000, dtype=np.int32)
        plan = ferromoe.Dispatch(slots[:2], slots, slots.reshape(1000, 3))
        x = np.random.default_rng(0).standard_normal((1000, 500), np.float32)

        with ThreadPoolExecutor(3) as threads:
            for y in threads.map(lambda _: ferromoe.permute(x, plan), range(100)):
                assert (y == x[slots // 3]).all()
        assert ferromoe._core.thread_team() == "own pool"
    """
    run_python(script)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_panic_is_an_exception(threads: int) -> None:
    expected = there_and_back()
    torch.set_num_threads(threads)
    with pytest.raises(RuntimeError, match=r"^internal error: item \d+ fails on purpose$"):
        _core.fail_on_threads()
    for got, want in zip(there_and_back(), expected, strict=True):
        assert torch.equal(got, want)


def test_a_panic_on_the_own_pool_is_an_exception() -> None:
    script = """
        from ferromoe import _core, set_num_threads
        set_num_threads(2)
        for _ in range(20):
            try:
                _core.fail_on_threads()
            except RuntimeError as error:
                assert str(error).startswith("internal error: item "), error
            else:
                raise AssertionError("nothing was raised")
        assert _core.thread_team() == "own pool"
    """
    run_python(script)


def test_memory_can_be_released() -> None:
    there_and_back()
    kept, huge = _core.kept_memory()
    assert 0 <= huge <= kept
    assert ferromoe.release_memory() == kept
    assert _core.kept_memory() == (0, 0)
    assert ferromoe.release_memory() == 0
