"""What is printed while training runs: a line a step, and a bar in a terminal. The log keeps everything."""

import os
import pty
import re
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATIENT_RUN, Corridor, make_model, make_tokenizer
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.reports.progress import BarAndLines, Lines, StepLines
from trl_epo.reports.step_table import panel_row


SETTINGS = {
    **PATIENT_RUN,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_turns": 2,
    "max_turn_length": 4,
    "max_steps": 3,
}
PANELS = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "per_device_eval_batch_size": 4,
    "num_generations_eval": 2,
}
# All that TRL and we log of a step, twins included
LOGGED = ("loss", "entropy", "epo/entropy", "reward", "episode/return", "num_tokens", "step_time", "time/update")
HEADER = ["step", "success", "return", "invalid", "entropy", "corridor", "tokens/s", "seconds"]


def make_trainer(folder: Path, *callbacks, rows=None, **kwargs) -> EPOTrainer:
    return EPOTrainer(
        make_model(),
        args=EPOConfig(str(folder), **{**SETTINGS, **kwargs}),
        eval_dataset=rows,
        processing_class=make_tokenizer(),
        environment_factory=Corridor,
        callbacks=list(callbacks),
    )


def seconds(entry: dict) -> float:
    return sum(value for name, value in entry.items() if name.startswith("time/"))


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_line_a_step_in_a_file(tmp_path, capfd, disable_tqdm):
    rows = Dataset.from_dict({"length": [2, 3]})
    trainer = make_trainer(tmp_path, rows={"iid": rows, "ood": rows}, disable_tqdm=disable_tqdm, **PANELS)
    capfd.readouterr()
    trainer.train()
    out, err = capfd.readouterr()
    assert not re.search(r"[^\n -~]", out)  # no control characters
    assert "\r" not in err and "it/s" not in err
    names, *steps, iid, ood, end = out.splitlines()
    assert names.split() == HEADER
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for line, entry in zip(steps, entries, strict=True):
        assert set(LOGGED) <= entry.keys()
        corridor = "-"
        if entry["step"] > 1:
            corridor = f"{entry['epo/corridor_low']:.3f}-{entry['epo/corridor_high']:.3f}"
        assert line.split() == [
            f"{entry['step']}/3",
            f"{entry['episode/success_rate']:.1%}",
            f"{entry['episode/return']:.3f}",
            f"{entry['episode/invalid_actions']:.1%}",
            f"{entry['epo/entropy']:.3f}",
            corridor,
            f"{entry['rollout/tokens_per_second']:,.0f}",
            f"{seconds(entry):.1f}",
        ]
        assert len(line) < 80
    for name, line in (("iid", iid), ("ood", ood)):
        panel = next(e for e in trainer.state.log_history if f"eval_{name}_episode/count" in e)
        rate, low, high = (panel[f"eval_{name}_episode/success_{key}"] for key in ("rate", "low", "high"))
        assert line.startswith(
            f"eval {name} at step 3: success {rate:.1%} (95 %: {100 * low:.1f}-{high:.1%}), return "
        )
        assert line.endswith(", episodes 4")
    assert re.fullmatch(r"3 steps, \d+ seconds of training", end)


def in_terminal(monkeypatch, width: int, act: Callable[[], None]) -> str:
    """What is written while a pseudo-terminal is standard output and error."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, width))
    monkeypatch.setenv("COLUMNS", str(width))  # pytest keeps the original standard output
    read = bytearray()

    def drain():
        while b"\x04" not in read:
            read.extend(os.read(master, 4096))

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    with monkeypatch.context() as patch, open(slave, "w") as stream:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        try:
            act()
        finally:
            stream.write("\x04")
            stream.flush()
            thread.join()
    os.close(master)
    return read.decode().replace("\r\n", "\n").removesuffix("\x04")


@pytest.mark.parametrize(("width", "num_columns"), [(80, 8), (50, 5), (5, 1)])
def test_a_terminal_has_a_bar_and_lines_that_fit(tmp_path, monkeypatch, width, num_columns):
    rows = Dataset.from_dict({"length": [2]})
    trainer = make_trainer(tmp_path, rows=rows, disable_tqdm=False, **PANELS)
    text = in_terminal(monkeypatch, width, trainer.train)
    assert re.search(r"\r *\d+%" if width > 5 else r"\r", text)  # the bar
    lines = [line.split("\r")[-1] for line in text.split("\n")]
    names = next(line for line in lines if line.split()[:1] == ["step"])
    assert names.split() == HEADER[:num_columns]
    steps = [line for line in lines if re.match(r" +\d/3($| )", line)]
    assert len(steps) == 3 and all(len(line) <= max(width, 10) for line in steps)
    assert sum("eval at step 3: success " in line for line in lines) == 1


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_an_evaluation_by_itself(tmp_path, capfd, disable_tqdm):
    trainer = make_trainer(
        tmp_path, rows=Dataset.from_dict({"length": [2, 3]}), disable_tqdm=disable_tqdm, per_device_eval_batch_size=4
    )
    capfd.readouterr()
    trainer.evaluate()
    assert re.fullmatch(
        r"eval at step 0: success \d+\.\d% \(95 %: .*\), return .*, episodes 8\n", capfd.readouterr().out
    )


def entry(**kwargs) -> dict:
    return {"epo/entropy": 0.5, "epo/corridor_low": 0.4, "epo/corridor_high": 1.0, **kwargs}


def test_which_bound_the_entropy_has_passed():
    lines = StepLines()

    def corridor(**kwargs):
        return re.split(r" {2,}", lines.of(entry(**kwargs), 1, 9, 99)[-1].strip())[5]

    assert corridor() == "0.400-1.000"
    assert corridor(**{"epo/entropy": 0.3}) == "< 0.400"
    assert corridor(**{"epo/entropy": 1.2}) == "> 1.000"


def test_names_now_and_then_and_when_the_terminal_narrows():
    lines = StepLines()
    written = [len(lines.of(entry(), step, 99, 80)) for step in range(41)]
    assert [step for step, number in enumerate(written) if number == 2] == [0, 20, 40]
    assert len(lines.of(entry(), 41, 99, 79)) == 1
    assert len(lines.of(entry(), 42, 99, 60)) == 2


def test_a_number_is_shown_whole_or_not_at_all():
    panel = {
        "eval_iid_episode/count": 1280,
        "eval_iid_episode/stop/failure": 0.5,
        "eval_iid_episode/success_rate": 0.25,
        "eval_iid_episode/success_low": 0.2,
        "eval_iid_episode/success_high": 0.3,
        "eval_iid_episode/return": -1.5,
    }
    whole = "eval iid at step 7: success 25.0% (95 %: 20.0-30.0%), return -1.500, episodes 1280, 640 failed"
    assert StepLines().of(panel, 7, 9, float("inf")) == [whole]
    starts = [StepLines().of(panel, 7, 9, width)[0] for width in range(1, 100)]
    assert {*starts} == {whole[: whole.find(end)] for end in (" (95", ", ret", ", epi")} | {whole}
    failed = {"eval_episode/count": 2, "eval_episode/stop/failure": 1.0}
    assert StepLines().of(failed, 7, 9, 99) == ["eval at step 7: success -, return -, episodes 2, 2 failed"]


def test_panels_by_name():
    assert panel_row({"eval_test_set_episode/count": 1}, 1).panel == "test_set"
    assert panel_row({"eval_reward": 1.0}, 1) is None


def test_other_processes_print_nothing(capfd, tmp_path):
    state = TrainerState(max_steps=9, is_world_process_zero=False, is_local_process_zero=False)
    args = EPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    capfd.readouterr()
    for callback in (Lines(), BarAndLines()):
        for event in ("on_train_begin", "on_step_end"):
            getattr(callback, event)(args, state, TrainerControl())
        callback.on_log(args, state, TrainerControl(), logs=entry())
    assert capfd.readouterr() == ("", "")


def test_logs_of_others_are_printed_as_ever(tmp_path, capfd):
    class Mine(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.callback.on_log(args, state, control, logs={"mine": 1.0})

    mine = Mine()
    trainer = make_trainer(tmp_path, mine, max_steps=1)
    mine.callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, Lines))
    trainer.train()
    assert "{'mine': '1'}\n" in capfd.readouterr().out


class TestWhoseCallback:
    def kinds(self, trainer):
        kinds = (PrinterCallback, ProgressCallback)
        return [type(each) for each in trainer.callback_handler.callbacks if isinstance(each, kinds)]

    def test_ours_takes_the_place_of_trainers(self, tmp_path):
        assert self.kinds(make_trainer(tmp_path)) == [Lines]
        trainer = make_trainer(tmp_path, disable_tqdm=False)
        assert self.kinds(trainer) == [BarAndLines]
        trainer.remove_callback(ProgressCallback)  # as scripts do
        assert self.kinds(trainer) == []

    def test_the_users_stays(self, tmp_path):
        class Own(ProgressCallback):
            pass

        assert self.kinds(make_trainer(tmp_path, Own(), disable_tqdm=False)) == [Own, BarAndLines]

    def test_without_a_text_environment_trainers_stays(self, tmp_path):
        trainer = EPOTrainer(
            make_model(),
            reward_funcs=lambda completions, **kwargs: [0.0 for _ in completions],
            args=EPOConfig(str(tmp_path), **{k: v for k, v in SETTINGS.items() if "turn" not in k}),
            train_dataset=Dataset.from_dict({"prompt": ["left"]}),
            processing_class=make_tokenizer(),
        )
        assert self.kinds(trainer) == [PrinterCallback]
