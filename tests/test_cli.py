"""The command line, as a person meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import TEXT, write
from ferromoe import __version__
from ferromoe.compress import make_plan


def ferromoe(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ferromoe", *map(str, words)]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("mixtral", tmp_path_factory.mktemp("cli") / "model")


def test_from_a_checkpoint_to_a_smaller_one(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT[:256])
    shown = ferromoe("inspect", model)
    assert shown.returncode == 0, shown.stderr
    assert "mixtral" in shown.stdout
    assert "--method stun --experts 3" in shown.stdout
    plan = ["plan", model, "--method", "stun", "--experts", "3"]
    dry = ferromoe(*plan, "--dry-run")
    assert "6 -> 3" in dry.stdout
    assert not (tmp_path / "plan.json").exists()
    done = ferromoe(*plan, "--output", tmp_path / "plan.json", "--progress", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[0])["job"] == "plan"
    applied = ferromoe("apply", model, tmp_path / "plan.json", "--output", tmp_path / "out")
    assert "model.safetensors" in applied.stdout
    again = ferromoe("apply", model, tmp_path / "plan.json", "--output", tmp_path / "out")
    assert again.returncode == 1
    assert "must be a new or empty folder" in again.stderr
    measured = ferromoe("eval", tmp_path / "out", "--text", text)
    assert measured.returncode == 0, measured.stderr
    assert "bits per byte" in measured.stdout


def test_a_warning_is_one_line(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("few tokens")
    plan = ["plan", write("olmoe", tmp_path / "model"), "--method", "m-smoe", "--experts", "4"]
    done = ferromoe(*plan, "--calibrate", text, "--dry-run")
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: plan: ")]
    assert len(warned) == 2, done.stderr
    assert warned[1].endswith("calibrate with more text")
    assert "UserWarning" not in done.stderr


def test_ctrl_c_exits_with_130(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT * 1400)
    command = [sys.executable, "-m", "ferromoe", "eval", str(model), "--text", str(text)]
    command += ["--progress", "json"]
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Where the tests run in the background of a shell, it made children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stderr is not None
    # Wait for the work itself: an import that is interrupted may swallow the signal.
    while "layer 0" not in (line := child.stderr.readline()):
        assert line, "the job ended before it began"
    child.send_signal(signal.SIGINT)
    try:
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert "stopped" in said
    assert "Traceback" not in said


def test_info_is_a_table_for_bug_reports() -> None:
    shown = ferromoe("info")
    assert shown.returncode == 0, shown.stderr
    for word in ("register tile", "threads", "gpu", "cuda kernels", "verified on a chip", "torch"):
        assert word in shown.stdout


def test_the_version_is_told() -> None:
    shown = ferromoe("--version")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == f"ferromoe {__version__}\n"


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["plan", "MODEL", "--method", "magic", "--experts", "3", "--dry-run"], 2, "got 'magic'"),
        (
            ["plan", "MODEL", "--method", "stun", "--experts", "1", "--dry-run"],
            2,
            "in 2..6",
        ),
        (["plan", "MODEL", "--method", "stun", "--experts", "3"], 2, "output must name a file"),
        (
            ["plan", "MODEL", "--method", "stun", "--experts", "3", "--output", "no/plan.json"],
            2,
            "output must be a file in a folder that exists, got no/plan.json",
        ),
        (["plan", "MODEL", "--method", "stun", "--experts", "3", "--output", "."], 2, "got ."),
        (["plan", "MODEL", "--method", "stun", "--experts", "x", "--dry-run"], 2, "valid int"),
        (["inspect", "nowhere"], 1, "no such file or folder"),
        (["apply", "MODEL", "missing.json", "--output", "out"], 1, "missing.json"),
        (["apply", "MODEL", "missing.json", "--output", "out"], 1, "plan: path must be a file"),
        (["eval", "MODEL", "--text", "missing.txt"], 1, "eval: text must be a file that can be"),
        (
            [
                *("plan", "MODEL", "--method", "m-smoe", "--experts", "3", "--dry-run"),
                *("--calibrate", "missing.txt"),
            ],
            1,
            "calibrate: text must be a file that can be read, got missing.txt: No such file",
        ),
        (
            [
                *("plan", "MODEL", "--method", "stun", "--experts", "3", "--dry-run"),
                *("--calibrate", "text.txt"),
            ],
            2,
            "plan: calibrate must be left out for stun, which reads no text, got text.txt",
        ),
        (
            [
                *("plan", "MODEL", "--method", "m-smoe", "--experts", "3", "--dry-run"),
                *("--calibrate", "text.txt", "--kappa", "2"),
            ],
            2,
            "plan: kappa must be left out for m-smoe, which has no such option, got 2",
        ),
        (
            [
                *("plan", "MODEL", "--method", "stun", "--experts", "3", "--dry-run"),
                *("--kappa", "-1"),
            ],
            2,
            "plan: kappa must be at least 0, got -1",
        ),
        (["fly"], 2, "No such command 'fly'"),
        (["demo", "--shape", "round"], 2, "shape must be one of olmoe"),
    ],
)
def test_errors_are_one_sentence(
    words: list[str], status: int, sentence: str, model: Path, tmp_path: Path
) -> None:
    done = ferromoe(*(model if word == "MODEL" else word for word in words), cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["eval", "model", "--text", "empty"], 2, "text must be a folder with files in it"),
        (
            ["apply", "model", "latin.json", "--output", "out"],
            2,
            "path must be UTF-8, got byte 0xe9",
        ),
        (["apply", "model", "plan.json", "--output", "model/out"], 2, "apart from the input model"),
        (["apply", "model", "plan.json", "--output", "link"], 2, "apart from the input model"),
        (["apply", "model", "plan.json", "--output", "."], 2, "apart from the input model, got ."),
        (
            [
                *("plan", "model", "--method", "stun", "--experts", "3"),
                *("--output", "model/config.json"),
            ],
            1,
            "output must be a new file or an earlier plan, got model/config.json",
        ),
    ],
)
def test_files_in_the_way_stay_as_they_are(
    words: list[str], status: int, sentence: str, tmp_path: Path
) -> None:
    model = write("mixtral", tmp_path / "model")
    make_plan(model, method="stun", experts=3).save(tmp_path / "plan.json")
    (tmp_path / "latin.json").write_bytes(b'{"format": "caf\xe9"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("model")

    def everything() -> dict[Path, bytes | None]:
        return {p: p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")}

    before = everything()
    done = ferromoe(*words, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert everything() == before


def test_an_earlier_plan_is_overwritten(model: Path, tmp_path: Path) -> None:
    words = ["plan", model, "--method", "stun", "--output", "plan.json", "--experts"]
    for experts in ("4", "3"):
        done = ferromoe(*words, experts, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert json.loads((tmp_path / "plan.json").read_text())["totals"]["experts_out"] == 6
