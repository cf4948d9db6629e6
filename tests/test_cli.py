import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("typer")

import checkpoints
from ferromoe.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201
    monkeypatch.setenv("COLUMNS", "120")

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("import ferromoe  # tokens, experts и слова\n" * 12, encoding="utf-8")
    return path


def test_the_whole_way(run, tmp_path: Path, text: Path) -> None:  # noqa: ANN001
    model = checkpoints.folder("olmoe")
    code, out, _ = run("inspect", model)
    assert code == 0
    for word in ("olmoe", "8 per layer, top 2", "linear", "F32", "stun", "m-smoe"):
        assert word in out
    for method, extra in (("stun", ()), ("m-smoe", ("--calibrate", text, "--align", "perm"))):
        plan, folder = tmp_path / f"{method}.json", tmp_path / method
        code, out, err = run(
            "plan", model, "--method", method, "--experts", 4, "--output", plan, *extra
        )
        assert code == 0, err
        assert "8 → 4" in out
        code, out, err = run("apply", model, plan, "--output", folder, "--progress", "json")
        assert code == 0, err
        last = json.loads(err.strip().splitlines()[-1])
        assert last["job"] == "apply"
        assert last["done"] == last["total"] > 0
        code, out, err = run("eval", folder, "--text", text)
        assert code == 0, err
        assert "bits/byte" in out
    params = json.loads((tmp_path / "m-smoe.json").read_text())["method"]["params"]
    assert params == {"align": "perm", "capacity": 0, "similarity": "router-logits"}


def test_statistics_can_be_kept(run, tmp_path: Path, text: Path) -> None:  # noqa: ANN001
    model, stats = checkpoints.folder("olmoe"), tmp_path / "stats.safetensors"
    words = ("plan", model, "--method", "m-smoe", "--ratio", 0.5, "--form", "expanded")
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    assert run(*words, "--calibrate", text, "--save-stats", stats, "--output", first)[0] == 0
    assert run(*words, "--stats", stats, "--output", second)[0] == 0
    assert first.read_bytes() == second.read_bytes()


def test_a_dry_run_writes_nothing(run, tmp_path: Path) -> None:  # noqa: ANN001
    model, plan = checkpoints.folder("olmoe"), tmp_path / "plan.json"
    words = ("plan", model, "--method", "stun", "--experts", 4, "--output", plan)
    code, out, _ = run(*words, "--dry-run")
    assert code == 0
    assert "8 → 4" in out
    assert not plan.exists()
    assert run(*words)[0] == 0
    code, out, _ = run("apply", model, plan, "--output", tmp_path / "out", "--dry-run")
    assert code == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "/no/such/model"], "model: folder must exist, got '/no/such/model'"),
        (["plan", "MODEL", "--method", "magic", "--experts", "4"], "must be one of m-smoe, stun"),
        (["plan", "MODEL", "--method", "stun"], "exactly one of --experts, --ratio and"),
        (["plan", "MODEL", "--method", "stun", "--experts", "1"], "at least top_k, 2, got 1"),
        (["plan", "MODEL", "--method", "stun", "--experts", "4", "--ratio", "0.5"], "--ratio"),
        (["plan", "MODEL", "--method", "stun", "--experts", "x"], "Invalid value for '--experts'"),
        (["plan", "MODEL", "--method", "m-smoe", "--experts", "4"], "--calibrate TEXT"),
        (["plan", "MODEL", "--method", "stun", "--experts", "4", "--nope", "1"], "got --nope"),
        (["plan", "MODEL"], "Missing option '--method'"),
        (["apply", "MODEL", "/no/plan.json", "--output", "/no/out"], "plan: file must exist"),
        (["eval", "MODEL", "--text", "/no/text"], "text: file must exist, got '/no/text'"),
        (["eval", "MODEL", "--text", "/no/text", "--progress", "loud"], "got 'loud'"),
        (["frobnicate"], "No such command"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_status_2(
    run, words: list[str], message: str  # noqa: ANN001
) -> None:  # fmt: skip
    model = str(checkpoints.folder("olmoe"))
    code, out, err = run(*[model if word == "MODEL" else word for word in words])
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_an_existing_output_is_left_alone(run, tmp_path: Path) -> None:  # noqa: ANN001
    model, plan, out = checkpoints.folder("olmoe"), tmp_path / "plan.json", tmp_path / "out"
    assert run("plan", model, "--method", "stun", "--experts", 4, "--output", plan)[0] == 0
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    code, _, err = run("apply", model, plan, "--output", out)
    assert code == 2
    assert str(out) in err
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


def test_a_failed_job_is_1_and_ctrl_c_is_130(run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    import ferromoe.compress.source as source

    def fail(error: BaseException) -> None:
        def opened(*_: object) -> None:
            raise error

        monkeypatch.setattr(source.Source, "__init__", opened)

    fail(OSError(28, "No space left on device"))
    code, _, err = run("inspect", "model")
    assert (code, "No space left" in err) == (1, True)
    fail(KeyboardInterrupt())
    code, _, err = run("inspect", "model")
    assert (code, "interrupted" in err) == (130, True)
    fail(ModuleNotFoundError("No module named 'transformers'", name="transformers"))
    code, _, err = run("inspect", "model")
    assert (code, "pip install 'ferromoe[transformers]'" in err) == (1, True)


def test_help_lists_the_methods_without_torch() -> None:
    code = (
        "import sys; from ferromoe.cli import run; run(['plan', '--help']); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "m-smoe" in done.stdout
    assert "STUN" in done.stdout
