"""However a trainer ends, the processes of its environments end with it: real trainers, really killed."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import child_environment, make_model, make_tokenizer, wait_for
from datasets import Dataset
from faulty import Faulty

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.envs.fork_server import PROCESS_NAME, SERVER_NAME
from trl_epo.envs.process import ProcessEnv
from trl_epo.envs.scienceworld import ScienceWorld
from trl_epo.runs.interruption import SAME_REQUEST


class WithJava(ProcessEnv):
    """An environment in a process of its own, and another one in the Java process of this one."""

    def __init__(self, folder: str):
        super().__init__(partial(Faulty, "stop", 2, folder))
        self.other = ScienceWorld("boil", 0)

    def reset(self, *, seed=None, options=None):
        self.other.reset()
        return super().reset(seed=seed)

    def step(self, action):
        self.other.step("look around")
        return super().step(action)


def train(folder: Path) -> None:
    """Plays on and on; with a token in the folder, one process is stopped in its second step."""
    # A shell has what it starts in the background ignore it, tests included.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args = EPOConfig(
        str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        max_turns=4,
        max_turn_length=4,
        max_steps=10**6,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to="none",
    )
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "Play!"}]] * 4})

    def reward(episodes, **kwargs):
        folder.joinpath("plays").touch()
        if folder.joinpath("raise").exists():
            raise ValueError("no reward")
        return [1.0] * len(episodes)

    EPOTrainer(
        make_model(),
        reward,
        args=args,
        train_dataset=rows,
        processing_class=make_tokenizer(),
        environment_factory=partial(WithJava, str(folder / "tokens")),
        action_parser=lambda text: text or "look",
    ).train()


def environments(trainer: psutil.Process) -> list[psutil.Process]:
    """Processes of environments, the server that they are forked from, and Java."""
    return [
        child
        for child in trainer.children(recursive=True)
        if "java" in child.name() or child.name() in (PROCESS_NAME, SERVER_NAME)
    ]


@pytest.mark.jvm
@pytest.mark.parametrize(
    ("end", "stopped"),
    [
        (signal.SIGTERM, False),
        (signal.SIGTERM, True),
        (signal.SIGINT, True),
        (signal.SIGKILL, True),
        ("exception", False),
    ],
    ids=["SIGTERM", "SIGTERM, one stopped", "SIGINT, one stopped", "SIGKILL, one stopped", "exception"],
)
def test_nothing_is_left(tmp_path, end, stopped):
    (tmp_path / "tokens").mkdir()
    log = tmp_path / "log"
    with log.open("w") as output:
        trainer = subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=child_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        assert wait_for(lambda: (tmp_path / "plays").exists() or trainer.poll() is not None)
        assert trainer.poll() is None, log.read_text()
        of_trainer = psutil.Process(trainer.pid)
        everything = of_trainer.children(recursive=True)
        assert len(environments(of_trainer)) == 6  # 4 processes, the server that forks them, and Java
        assert [os.getpgid(p.pid) == p.pid for p in environments(of_trainer) if "java" in p.name()] == [
            True
        ]  # no Ctrl-C
        if stopped:
            (tmp_path / "tokens" / "0").touch()
            assert wait_for(lambda: any(p.status() == "stopped" for p in environments(of_trainer)))
        if end == "exception":
            (tmp_path / "raise").touch()
        else:
            trainer.send_signal(end)
            if end != signal.SIGKILL and stopped:
                # The first one asks for a checkpoint, which would wait for the environment. A second SIGTERM soon after it
                # counts as the same.
                assert wait_for(lambda: ": writing a checkpoint" in log.read_text())
                time.sleep(SAME_REQUEST + 0.5 if end == signal.SIGTERM else 0)
                trainer.send_signal(end)
        assert trainer.wait(300) != 0
        gone, alive = psutil.wait_procs(everything, timeout=60)
        assert not alive, (alive, log.read_text())
    finally:
        trainer.kill()


if __name__ == "__main__":
    train(Path(sys.argv[1]))
