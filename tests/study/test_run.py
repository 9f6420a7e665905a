"""The study's runner on a minuscule regime, with the real game, warm-up and trainer."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import one_run
import plan
import pytest
import regime
import run
import yaml
from conftest import child_environment
from one_run import Run, perform, what_went_wrong
from plan import ARMS, PHASES, TRIALS, arm_settings
from regime import Regime, registered_regime
from rows import read_rows

from trl_epo.entropy.objective import corridor_side


STUDY = Path(run.__file__).parent
TINY = {
    "turns": 5,
    "warm_up_episodes": 24,
    "steps": 4,
    "episodes": 8,
    "group": 4,
    "kl_weight": 0.01,
    "panel_rows": 3,
    "evaluate_every": 2,
    "log_every": 1,
    "save_every": 1,
}
# Its gradient is not 0 where no episode succeeds
ARM = "bonus/8"
# As `python run.py`, but killed when the third step has been made and the second one's checkpoint is whole
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import one_run, run
def kill(self, args, state, control, **kwargs):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
one_run.CpuSeconds.on_step_end = kill
run.main()
"""


def arguments(folder: Path) -> list[str]:
    script = {"phase": "pilot", "arms": ARM, "seeds": 950, "output_dir": folder, "results": folder / "rows.jsonl"}
    return [word for name, value in (script | TINY).items() for word in (f"--{name}", str(value))]


def run_main(monkeypatch, folder: Path) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments(folder)])
    run.main()
    return read_rows(folder / "rows.jsonl")


def without_time(row: dict) -> dict:
    return {**row, "cpu_seconds": None, "warm_start": {**row["warm_start"], "cpu_seconds": None}}


def test_killed_and_resumed_equals_not_interrupted(tmp_path, monkeypatch, capsys):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    command = [sys.executable, "-c", KILLED, str(STUDY), *arguments(cut)]
    killed = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert not (cut / "rows.jsonl").exists()
    assert [folder.name for folder in cut.glob("pilot/*/checkpoint-*") if (folder / "manifest.json").exists()]
    made = next(cut.glob("warm/*/warm_start.json")).stat().st_mtime_ns

    capsys.readouterr()
    (resumed,) = run_main(monkeypatch, cut)
    shown = capsys.readouterr().out
    assert " 3/4 " in shown and " 2/4 " not in shown
    (row,) = run_main(monkeypatch, whole)
    assert without_time(resumed) == without_time(row)
    assert next(cut.glob("warm/*/warm_start.json")).stat().st_mtime_ns == made  # not made again
    assert not list(cut.glob("pilot/*"))  # nothing is left of a run that has its row
    assert (row["phase"], row["arm"], row["seed"], row["steps"]) == ("pilot", ARM, 950, 4)
    assert [each["step"] for each in row["evaluations"]] == [2, 4]
    assert row["curve"]["step"] == [1, 2, 3, 4]
    assert len(set(row["curve"]["entropy"])) == 4  # something is trained
    assert row["warm_start"]["entropy"] == pytest.approx(row["curve"]["entropy"][0], rel=1e-4)
    assert row["settings"] == {"entropy_coef": 0.03, "entropy_smoothing": "none"}
    assert row["cpu_seconds"] > 0

    assert run_main(monkeypatch, cut) == [resumed]  # a run that has a row is not run again
    with pytest.raises(ValueError, match="another regime"):
        monkeypatch.setitem(TINY, "steps", 6)
        run_main(monkeypatch, cut)


def test_a_run_that_fails_is_a_row(tmp_path):
    """A learning rate that throws the weights away in the first step: no policy is left to be played."""
    settings = {"entropy_coef": 0.03, "entropy_smoothing": "none", "learning_rate": 1e38}
    row = perform(Run("pilot", "broken", 951, Regime(**TINY), settings, "abc", tmp_path))
    json.dumps(row, allow_nan=False)
    assert "Error: " in row["error"]
    assert {"error", "lost"} <= {*row["diverged"]}
    assert row["success_at_0.4"] == row["success_at_1"] == 0.0
    assert row["steps"] < 4


def log(entropy: float, success: float, **more: float) -> list[dict]:
    evaluation = {f"eval_at_{temperature}_episode/success_rate": success for temperature in ("0.4", "1")}
    return [{"loss": 0.0, "step": 20, "epo/entropy": entropy, **more}, {"step": 20, **evaluation}]


@pytest.mark.parametrize(
    ("history", "error", "found"),
    [
        (log(1.0, 0.1), None, []),
        (log(3.5, 0.1), None, ["entropy"]),  # ½ ln 1024 = 3.47
        (log(1.0, 0.04), None, ["lost"]),
        (log(1.0, 0.1, **{"faults/nonfinite_steps": 1}), None, ["not finite"]),
        ([], "RuntimeError: …", ["error", "lost"]),
    ],
)
def test_what_went_wrong(history, error, found):
    assert what_went_wrong(history, error, {"success_at_0.4": 0.1, "success_at_1": 0.1}, 1024) == found


def test_a_curve_has_no_nan():
    """JSON has none; the steps of evaluations are not training's."""
    history = [{"loss": 0.0, "step": 2, "grad_norm": math.nan, "epo/entropy": 0.1234567}, *log(1.0, 0.1)[1:]]
    curve = one_run.curve_of(history)
    assert (curve["step"], curve["gradient_norm"], curve["success"]) == ([2], [None], [None])
    assert curve["entropy"] == [0.12346]


def test_other_settings_or_code_do_not_go_on_from_a_checkpoint(tmp_path):
    runs = [
        Run("pilot", "grpo", 0, regime, {"entropy_coef": coef}, commit, tmp_path)
        for regime in (Regime(), Regime(learning_rate=1e-4))
        for coef in (0.0, 0.1)
        for commit in ("abc", "def")
    ]
    assert len({each.folder for each in runs}) == 8
    assert len({each.warm_folder for each in runs}) == 2


@pytest.fixture
def chosen(tmp_path):
    file = tmp_path / "tuned.yaml"
    file.write_text("{epo-tuned: 3, bonus: 2, corridor: 8}")
    return file


def test_every_arm_of_the_plan_is_one_that_epoconfig_knows(tmp_path, chosen):
    names = [*ARMS, *(arm for phase in PHASES.values() for arm in phase.arms)]
    for name in names:
        settings = arm_settings(name, Regime(), chosen)
        config = Run("pilot", name, 0, Regime(), settings, "abc", tmp_path).config(**settings)
        assert {setting: getattr(config, setting) for setting in settings} == settings
    assert {len(trials) for trials in TRIALS.values()} == {8}


def test_settings_by_name(chosen):
    tuned = arm_settings("epo-tuned", Regime(), chosen)
    assert (tuned["entropy_coef"], tuned["entropy_smoothing_coef"], tuned["entropy_corridor_high"]) == (
        0.003,
        2.0,
        1.0,
    )
    alone = arm_settings("epo-tuned-unsmoothed", Regime(), chosen)
    assert alone == {"entropy_coef": 0.003, "entropy_smoothing": "none"}
    faster = arm_settings("corridor*4", Regime(learning_rate=1e-4), chosen)
    assert (faster["entropy_reference_end"], faster["learning_rate"]) == (1.5, 4e-4)
    assert arm_settings("ppo+epo-tuned", Regime(), chosen)["advantage_estimator"] == "gae"
    penalty = arm_settings("bonus", Regime(), chosen)
    low, high = penalty["entropy_corridor_low"], penalty["entropy_corridor_high"]
    assert corridor_side(0.2, reference=0.7, low=low, high=high) == (1, 0.0)  # a loss of 0.01 · L_H
    assert penalty["entropy_corridor_coef"] == 0.01


@pytest.mark.parametrize("name", ["gdpo", "grpo/1", "bonus/9", "bonus/0"])
def test_what_is_not_in_the_plan(name, chosen):
    with pytest.raises(ValueError, match="There is no"):
        arm_settings(name, Regime(), chosen)


def test_what_is_not_settled_is_not_run(tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text("{epo-tuned: null}")
    with pytest.raises(ValueError, match="run the tuning"):
        arm_settings("epo-tuned", Regime(), file)
    values = {**one_run.asdict(Regime()), "kl_weight": None}
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="does not say kl_weight"):
        registered_regime(file)
    file.write_text(yaml.safe_dump({**values, "kl_weight": 0.01, "rums": 3}))
    with pytest.raises(ValueError, match="has rums"):
        registered_regime(file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"phase": "pilot"}, "say --arms and --seeds"),
        ({"phase": "main", "seeds": [16]}, r"\[16\] are not in phase 'main'"),
        ({"phase": "main", "arms": ["ppo"]}, r"\['ppo'\] are not in phase 'main'"),
    ],
)
def test_a_phase_is_run_as_planned(words, message):
    with pytest.raises(ValueError, match=message):
        run.planned(run.StudyArguments(**words), Regime())


def test_a_registered_phase(monkeypatch, tmp_path):
    """All trials of a seed, then those of the next, in the registered regime."""
    monkeypatch.setattr(run, "commit_of_code", lambda: "abc")
    monkeypatch.setattr(run, "registered_regime", lambda: Regime(turns=19))
    runs = run.planned(run.StudyArguments("tuning", seeds=[801, 802]), Regime())
    assert [each.key for each in runs[23:25]] == [("tuning", "corridor/8", 801), ("tuning", "epo-tuned/1", 802)]
    assert {(each.regime.turns, each.commit) for each in runs} == {(19, "abc")}
    assert len({each.folder for each in runs}) == 48
    assert len({each.warm_folder for each in runs}) == 2


def test_a_registered_phase_takes_no_flags_and_no_changed_code(monkeypatch):
    with pytest.raises(ValueError, match="'turns'.* for the pilot only"):
        run.planned(run.StudyArguments("main"), Regime(turns=9))
    monkeypatch.setattr(run, "commit_of_code", lambda: "abc+")
    with pytest.raises(ValueError, match="code and a plan that are committed"):
        run.planned(run.StudyArguments("main"), Regime())


def test_rows_of_other_code_are_not_continued(tmp_path):
    file = tmp_path / "main.jsonl"
    row = {"phase": "main", "arm": "epo", "seed": 0, "commit": "abc"}
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="rows of commit abc, but the code is at def"):
        run.left_to_do([Run("main", "grpo", 0, Regime(), {}, "def", tmp_path)], file)


def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    """Rows may be committed while the study runs; what decides a run has to be committed."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.commit_of_code() == "unknown"

    def commit(file: str) -> None:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(file)
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        for command in (["add", "--all"], [*who, "commit", "--quiet", "--message", file]):
            subprocess.run(["git", "-C", str(tmp_path), *command], check=True)

    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    commit("trl_epo/trainer.py")
    first = run.commit_of_code()
    assert len(first) == 40
    commit("examples/study/tuned.yaml")
    commit("examples/study/results/main.jsonl")
    assert run.commit_of_code() == first
    (tmp_path / "examples/study/tuned.yaml").write_text("bonus: 3")
    assert run.commit_of_code() == f"{first}+"
    commit("examples/study/one_run.py")
    assert run.commit_of_code() not in (first, f"{first}+")


@pytest.mark.parametrize("fields", [{"steps": 30, "evaluate_every": 20}, {"episodes": 60, "group": 8}])
def test_regimes_that_cannot_be(fields):
    with pytest.raises(ValueError, match="must be a multiple"):
        Regime(**fields)


def test_the_files_of_the_plan_name_all_there_is():
    assert yaml.safe_load(regime.REGISTERED.read_text()).keys() == one_run.asdict(Regime()).keys()
    assert yaml.safe_load(plan.CHOSEN.read_text()).keys() == TRIALS.keys()
    planned = {phase: len(PHASES[phase].arms) * len(PHASES[phase].seeds) for phase in PHASES}
    assert planned == {"pilot": 0, "tuning": 72, "main": 96, "rates": 60, "ppo": 20}
