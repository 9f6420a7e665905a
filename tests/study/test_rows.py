"""Rows of the study: added once, whole, and refused where they may not be compared."""

import doctest
import json

import analyse
import one_run
import pytest
from analyse import checked, confirmatory, write_report
from plan import HYPOTHESES, PHASES, SIX
from rows import append_row, locked, read_rows


def make_row(arm="grpo", seed=0, phase="main", success=0.5, commit="abc", **changes):
    curve = {name: [0.1, 0.2, 0.4] for name in one_run.CURVE}
    curve["success"] = [0.1, None, success]
    evaluations = [{"step": 20, "success_at_0.4": success, "success_at_1": success / 2}]
    return {
        "phase": phase,
        "arm": arm,
        "seed": seed,
        "commit": commit,
        "regime": {"take_off": 0.3, "steps": 20},
        "settings": {"arm": arm},
        "warm_start": {"success_at_0.4": 0.05, "success_at_1": 0.04, "entropy": 0.5, "cpu_seconds": 9.0},
        "evaluations": evaluations,
        "success_at_0.4": success,
        "success_at_1": success / 2,
        "error": None,
        "diverged": [],
        "steps": 20,
        "cpu_seconds": 60.0,
        "curve": {"step": [1, 10, 20], **curve},
        **changes,
    }


def test_added_once(tmp_path):
    file = tmp_path / "new" / "main.jsonl"
    append_row(file, make_row(seed=0))
    append_row(file, make_row(seed=1))
    with pytest.raises(ValueError, match="already"):
        append_row(file, make_row(seed=0, success=0.9))
    assert [row["seed"] for row in read_rows(file)] == [0, 1]
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_file_that_cannot_be_trusted(tmp_path):
    file = tmp_path / "main.jsonl"
    line = json.dumps(make_row())
    file.write_text(f"{line}\n{line[:50]}")
    with pytest.raises(ValueError, match="Line 2 .* is not JSON"):
        read_rows(file)
    file.write_text(f"{line}\n{line}\n")
    with pytest.raises(ValueError, match="Lines 1 and 2"):
        read_rows(file)


def test_a_row_that_is_cut_changes_nothing(tmp_path):
    file = tmp_path / "main.jsonl"
    append_row(file, make_row(seed=0))
    before = file.read_bytes()
    with pytest.raises(TypeError):
        append_row(file, make_row(seed=1, error=object()))  # not JSON: the copy is half written
    assert file.read_bytes() == before


def test_two_runners(tmp_path):
    with (
        locked(tmp_path / "lock", wait=False),
        pytest.raises(BlockingIOError),
        locked(tmp_path / "lock", wait=False),
    ):
        pass


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([make_row(), make_row(success=0.9)], "two rows of the run"),
        ([make_row(seed=0), make_row(seed=1, commit="def")], "2 commits"),
        ([make_row(seed=0), make_row(seed=1, settings={})], "another settings"),
        ([make_row(seed=0), make_row("epo", seed=0, regime={})], "another regime"),
    ],
)
def test_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        checked(rows)


def test_two_commits_if_told():
    assert len(checked([make_row(seed=0), make_row(seed=1, commit="def")], mixed_commits=True)) == 2


def test_no_test_before_all_pairs_are_there():
    arms = {arm: {seed: make_row(arm, seed) for seed in PHASES["main"].seeds} for arm in SIX}
    del arms["corridor"][3]
    assert confirmatory(arms) == "Not yet: H4: 15 of 16 pairs.\n"


def test_report(tmp_path):
    """EPO is 10 points above GRPO in every seed, tuned EPO 20, its λ without smoothing 30, the corridor equal."""
    above = {"epo": 0.1, "epo-tuned": 0.2, "epo-tuned-unsmoothed": 0.3}
    rows = [
        make_row(arm, seed, success=0.2 + 0.02 * seed + above.get(arm, 0.0))
        for arm in SIX
        for seed in PHASES["main"].seeds
    ]
    rows += [make_row(arm, seed, "rates") for arm in PHASES["rates"].arms for seed in PHASES["rates"].seeds]
    page = write_report(checked(rows), tmp_path).read_text()
    lines = {
        name: next(line for line in page.splitlines() if line.startswith(f"| {name} ")) for name, *_ in HYPOTHESES
    }
    assert "| `epo` − `grpo` | 16 | +10.0 (+10.0 to +10.0) | 0.00003 | 0.00012 |" in lines["H1"]
    assert "| -10.0 (-10.0 to -10.0) | 0.00003 | 0.00012 |" in lines["H3"]
    assert "| +0.0 (+0.0 to +0.0) | 1.00000 | 1.00000 |" in lines["H4"]
    # Success 0.2 to 0.5 by 0.02: eleven of sixteen are at least 0.3
    assert "| `grpo` | 16 | 5.0 % | 35.0 % (29.9 to 40.1) | 17.5 % | 68.8 % |" in page
    figures = {file.name for file in tmp_path.glob("*.png")}
    assert figures == {
        *("main-success.png", "main-entropy.png", "rates-success.png", "rates-entropy.png"),
        *("forest.png", "rates.png"),
    }
    assert all(f"({name})" in page for name in figures)


@pytest.mark.parametrize("module", [analyse, one_run])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0
