import pytest

from trl_epo.reports.plots import plot_training


def test_draws_what_is_there(tmp_path):
    history = [
        {"step": 1, "episode/success_rate": 0.1, "episode/return": 0.1, "epo/entropy": 0.5},
        {
            "step": 2,
            "episode/success_rate": 0.2,
            "episode/return": 0.2,
            "epo/entropy": 0.4,
            "epo/entropy_reference": 0.5,
            "epo/corridor_low": 0.0,
            "epo/corridor_high": 1.0,
        },
        {"step": 2, "eval_iid_episode/success_rate": 0.3},
        {"step": 2, "train_runtime": 1.0},
    ]
    assert plot_training(history, tmp_path / "run.png").get_axes()
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": 0.1}]])
def test_nothing_to_draw(tmp_path, history):
    with pytest.raises(ValueError, match="none of EPOTrainer's metrics"):
        plot_training(history, tmp_path / "run.png")
