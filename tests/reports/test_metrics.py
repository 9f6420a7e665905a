import pytest

from trl_epo.reports.metrics import EpisodeSummary, episode_metrics
from trl_epo.rollouts.episode import StopReason


def summary(
    success=None,
    task=None,
    episode_return=0.0,
    num_turns=1,
    invalid=0,
    stop=StopReason.TERMINATED,
    late=0,
    cut=0,
    cut_thoughts=0,
    environment=None,
):
    cut = {"num_cut_observations": cut, "num_cut_thoughts": cut_thoughts, "environment": environment}
    return EpisodeSummary(task, success, episode_return, num_turns, invalid, late, stop, **cut)


def test_hand_worked():
    metrics = episode_metrics(
        [
            summary(True, "heat", 1.0, 4, 1),
            summary(False, "heat", 0.0, 10, 3, StopReason.TRUNCATED, late=2, cut_thoughts=2),
            summary(True, "clean", 1.0, 6, 0, cut=3),
            summary(None, None, 0.5, 5, 1, StopReason.MAX_TURNS),
            summary(True, "clean", 9.0, 90, 90, StopReason.FAILURE),
        ]
    )
    assert metrics == {
        "episode/success_rate": pytest.approx(2 / 3),
        "episode/success_rate/clean": 1.0,
        "episode/success_rate/heat": 0.5,
        "episode/return": 2.5 / 4,
        "episode/turns": 25 / 4,
        "episode/invalid_actions": 5 / 25,
        "episode/cut_thoughts": 2 / 25,
        "episode/cut_turns": 0.0,
        "episode/late_answers": 2 / 4,
        "episode/cut_observations": 3 / 4,
        "episode/stop/terminated": 0.4,
        "episode/stop/truncated": 0.2,
        "episode/stop/max_turns": 0.2,
        "episode/stop/token_budget": 0.0,
        "episode/stop/failure": 0.2,
    }


def test_no_success_told_and_one_task():
    assert "episode/success_rate" not in episode_metrics([summary()])
    assert "episode/success_rate/heat" not in episode_metrics([summary(True, "heat")])


def test_several_environments():
    played = [(True, "house"), (False, "house"), (True, "lake"), (None, "lake"), (True, None)]
    metrics = episode_metrics([summary(success, environment=environment) for success, environment in played])
    assert metrics["episode/success_rate_in/house"] == 0.5
    assert metrics["episode/success_rate_in/lake"] == 1.0
    assert not [name for name in episode_metrics([summary(True, environment="house")]) if "rate_in" in name]


def test_kinds_that_rows_do_not_share_are_not_logged():
    for number, logged in ((50, 50), (51, 0)):
        metrics = episode_metrics([summary(True, f"put mug {i} on desk") for i in range(number)])
        assert len([name for name in metrics if name.startswith("episode/success_rate/")]) == logged
        assert metrics["episode/success_rate"] == 1.0


def test_nothing():
    assert episode_metrics([]) == {}
    assert episode_metrics([summary(stop=StopReason.FAILURE)])["episode/stop/failure"] == 1.0
