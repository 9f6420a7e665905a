"""Environments that crash, hang, die and lie, in real training: real threads, processes, kills and a real JVM."""

import json
import os
import signal
import threading
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from conftest import CPU_RUN, Corridor, make_model
from datasets import Dataset, IterableDataset
from faulty import Faulty
from faulty_runs import When, limit_files
from transformers import TrainerCallback

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.envs.household import Household
from trl_epo.envs.process import ProcessEnv
from trl_epo.envs.scienceworld import ScienceWorld
from trl_epo.runs.checkpoints import last_whole_checkpoint


BASE = {
    **CPU_RUN,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "max_turns": 4,
    "max_turn_length": 5,
    "max_steps": 2,
    "env_timeout": 120.0,
}


def make_trainer(tmp_path, tokenizer, factory, **settings):
    rows = settings.pop("rows", None)
    return EPOTrainer(
        make_model(),
        args=EPOConfig(str(tmp_path), **{**BASE, **settings}),
        train_dataset=rows or Dataset.from_dict({"length": [9, 9]}),
        processing_class=tokenizer,
        environment_factory=factory,
        action_parser=lambda text: text or "look",
    )


def logged(trainer, name):
    return [entry.get(name, 0.0) for entry in trainer.state.log_history if "episode/stop/failure" in entry]


def failures(tmp_path):
    path = tmp_path / "episodes" / "failures.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# fault, the turn it comes at, the kind it counts as
ON_A_THREAD = [
    ("crash", 0, "crash"),
    ("crash", 2, "crash"),
    ("hang", 0, "timeout"),
    ("hang", 2, "timeout"),
    ("bytes", 1, "invalid_answer"),
    ("nothing", 0, "invalid_answer"),
    ("nan", 1, "invalid_answer"),
    ("inf", 3, "invalid_answer"),
    ("success", 2, "invalid_answer"),
]
IN_A_PROCESS = [
    ("exit", 0, "process_died"),
    ("segfault", 2, "process_died"),
    ("kill", 1, "process_died"),
    ("stop", 1, "timeout"),
    ("hang", 2, "timeout"),
    ("leak", 2, "crash"),
]


@pytest.fixture
def tokens(tmp_path):
    """Makes so many faults happen."""
    folder = tmp_path / "tokens"
    folder.mkdir()

    def put(number):
        for index in range(number):
            (folder / str(index)).touch()

    put.folder = str(folder)
    return put


def hurry(trainer, seconds):
    """
    Environments have so many seconds for an answer until one has let its time pass, then as long as before: with all
    eight started already, and others to be started, this need not be long, however slow the machine.
    """
    pool = trainer._player.environments
    patience, discard = pool.timeout, pool.discard
    workers = [pool.take(None) for _ in range(8)]
    for answer in [worker.reset(0, {}) for worker in workers]:
        pool.wait_for(answer)
    for worker in workers:
        pool.give_back(None, worker)

    def have_time_again(worker):
        pool.timeout = patience
        discard(worker)

    pool.timeout, pool.discard = seconds, have_time_again


def check_one_fault(trainer, tmp_path, put, kind, at):
    put(1)
    trainer.train()
    assert logged(trainer, f"faults/{kind}") == [1.0, 1.0]
    assert logged(trainer, "faults/retried") == [1.0, 1.0]
    assert logged(trainer, "episode/stop/failure") == [0.0, 0.0]
    assert logged(trainer, "episode/turns") == [4.0, 4.0]
    (record,) = failures(tmp_path)
    assert record["kind"] == kind
    assert (record["mode"], record["step"], record["rl_step"], record["retried"]) == ("train", 0, 0, True)
    assert record["num_turns"] == max(at - 1, 0)
    assert record["options"] == {"length": 9}
    assert record["cause"].split(":")[0] in record["traceback"]
    assert (record["action"] is None) == (at == 0)


class TestOneEpisode:
    @pytest.mark.parametrize(("fault", "at", "kind"), ON_A_THREAD)
    def test_on_a_thread(self, tmp_path, tokenizer, tokens, fault, at, kind):
        trainer = make_trainer(tmp_path, tokenizer, partial(Faulty, fault, at, tokens.folder))
        if kind == "timeout":
            hurry(trainer, 3.0)
        check_one_fault(trainer, tmp_path, tokens, kind, at)

    @pytest.mark.parametrize(("fault", "at", "kind"), IN_A_PROCESS)
    def test_in_a_process(self, tmp_path, tokenizer, tokens, fault, at, kind):
        there = partial(Faulty, fault, at, tokens.folder)
        trainer = make_trainer(tmp_path, tokenizer, lambda: ProcessEnv(there, memory_limit=2**30))
        if kind == "timeout":
            hurry(trainer, 8.0)
        check_one_fault(trainer, tmp_path, tokens, kind, at)

    def test_with_continuous_batching(self, tmp_path, tokenizer, tokens):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            partial(Faulty, "nan", 2, tokens.folder),
            use_transformers_continuous_batching=True,
            transformers_continuous_batching_config={"max_memory_percent": 0.02},
            per_device_train_batch_size=4,
            max_turns=2,
            max_steps=1,
        )
        tokens(1)
        trainer.train()
        assert logged(trainer, "faults/invalid_answer") == logged(trainer, "faults/retried") == [1.0]
        assert logged(trainer, "episode/stop/failure") == [0.0]

    def test_a_time_out_at_the_start_says_so(self, tmp_path, tokenizer):
        made = count()

        class Slow(Corridor):
            def __init__(self):
                super().__init__()
                if next(made):
                    threading.Event().wait()

        kwargs = {"env_timeout": 1.0, "env_max_retries": 0, "max_failed_fraction": 1.0, "max_steps": 1}
        make_trainer(tmp_path, tokenizer, Slow, **kwargs).train()
        causes = [record["cause"] for record in failures(tmp_path)]
        assert len(causes) == 7
        assert all("It had to start in this time" in cause for cause in causes)

    def test_too_many_faults_leave_it_out(self, tmp_path, tokenizer, tokens):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            partial(Faulty, "crash", 2, tokens.folder),
            max_concurrent_episodes=1,
            env_max_retries=2,
        )
        tokens(3)
        trainer.train()
        assert logged(trainer, "faults/crash") == [3.0, 3.0]
        assert logged(trainer, "faults/retried") == [2.0, 2.0]
        assert logged(trainer, "episode/stop/failure") == [1 / 8, 0.0]
        records = failures(tmp_path)
        assert [record["retried"] for record in records] == [True, True, False]
        assert len({record["seed"] for record in records}) == 1

    def test_what_is_not_the_environments_fault_is_not_tried_again(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer, Corridor, env_max_retries=3, max_failed_fraction=1.0)
        trainer._player.action_parser = lambda text: {}[text]
        trainer.train()
        assert logged(trainer, "faults/input") == [8.0, 16.0]
        assert logged(trainer, "faults/retried") == [0.0, 0.0]
        assert "The action parser raised KeyError" in failures(tmp_path)[0]["cause"]

    def test_an_evaluation_counts_its_own(self, tmp_path, tokenizer, tokens):
        trainer = make_trainer(tmp_path, tokenizer, partial(Faulty, "crash", 1, tokens.folder), env_max_retries=0)
        tokens(1)
        metrics = trainer.evaluate(Dataset.from_dict({"length": [9, 9]}))
        assert metrics["eval_faults/crash"] == 1.0
        assert metrics["eval_episode/stop/failure"] == 1 / 8
        assert failures(tmp_path)[0]["mode"] == "eval"

    def test_an_interrupted_run_leaves_none_to_the_next(self, tmp_path, tokenizer, tokens):
        trainer = make_trainer(
            tmp_path, tokenizer, partial(Faulty, "crash", 1, tokens.folder), filter_zero_variance_groups="resample"
        )
        usual, calls = trainer._player.action_parser, count()

        def parser(text):
            if next(calls) == 40:  # the first batch has been played once, and is played again
                raise KeyboardInterrupt
            return usual(text)

        tokens(1)
        trainer._player.action_parser = parser
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.train()
        assert logged(trainer, "faults/crash") == [0.0, 0.0]
        assert logged(trainer, "groups/resampled") == [6.0, 6.0]

    def test_counts_go_on_with_other_batches(self, tmp_path, tokenizer, tokens):
        def make(**settings):
            factory = {"only": partial(Faulty, "crash", 1, tokens.folder)}
            rows = Dataset.from_dict({"environment": ["only"] * 2})
            return make_trainer(tmp_path, tokenizer, factory, rows=rows, save_strategy="steps", **settings)

        tokens(1)
        make(max_steps=1, save_steps=1).train()
        resumed = make(per_device_train_batch_size=4, gradient_accumulation_steps=2)
        resumed.train(resume_from_checkpoint=True)
        assert logged(resumed, "faults/crash") == [1.0, 1.0]
        assert failures(tmp_path)[0]["environment"] == "only"

    def test_the_file_is_plain_ascii(self, tmp_path, tokenizer, tokens):
        trainer = make_trainer(tmp_path, tokenizer, partial(Faulty, "crash", 1, tokens.folder))
        tokens(1)
        trainer.train()
        line = (tmp_path / "episodes" / "failures.jsonl").read_bytes()
        assert max(line) < 128
        assert b"\x1b" not in line and line.count(b"\n") == 1
        assert json.loads(line)["cause"].startswith("RuntimeError: the simulator crashed")

    def test_an_environment_that_changes_its_options(self, tmp_path, tokenizer):
        seen, numbers = [], count()

        class Greedy(Corridor):
            def reset(self, *, seed=None, options=None):
                seen.append(list(options["things"]))
                options["things"].clear()
                if next(numbers) == 1:  # the first is that of a check before training
                    raise RuntimeError("once more")
                return super().reset(seed=seed)

        rows = Dataset.from_dict({"things": [["key", "lamp"]] * 2})
        make_trainer(tmp_path, tokenizer, Greedy, rows=rows, max_steps=1).train()
        assert seen == [["key", "lamp"]] * (1 + 8 + 1)
        assert failures(tmp_path)[0]["options"] == {"things": ["key", "lamp"]}

    def test_options_that_json_cannot_carry(self, tmp_path, tokenizer, tokens):
        rows = IterableDataset.from_generator(lambda: iter([{"things": {(1, 2): "key"}}] * 8))
        trainer = make_trainer(tmp_path, tokenizer, partial(Faulty, "crash", 2, tokens.folder), rows=rows)
        tokens(1)
        trainer.train()
        (record,) = failures(tmp_path)
        assert record["kind"] == "crash"
        assert "TypeError" in record["options"]


class TestManners:
    def test_no_step_follows_the_end_of_an_episode(self, tmp_path, tokenizer):
        class Strict(Corridor):
            over = True

            def reset(self, **kwargs):
                self.over = False
                return super().reset(**kwargs)

            def step(self, action):
                if self.over:
                    raise RuntimeError("a step after the end")
                answer = super().step("r" if self.np_random.random() < 0.7 else "l")
                self.over = answer[2] or answer[3]
                return answer

        rows = Dataset.from_dict({"length": [1, 2]})
        trainer = make_trainer(tmp_path, tokenizer, Strict, rows=rows, max_steps=4)
        trainer.train()
        assert sum(logged(trainer, "episode/stop/terminated")) > 0
        assert failures(tmp_path) == []

    @pytest.mark.parametrize(
        "factory",
        [
            lambda: Household(turns=5),
            lambda: ProcessEnv(lambda: Household(turns=5)),
            pytest.param(lambda: ScienceWorld("boil", 0, turns=5), marks=pytest.mark.jvm),
        ],
        ids=["household", "in a process", "scienceworld"],
    )
    def test_our_environments_refuse_it(self, factory):
        env = factory()
        env.reset(seed=0)
        assert [env.step("look around")[3] for _ in range(5)] == [False] * 4 + [True]
        with pytest.raises(RuntimeError, match="reset"):
            env.step("look around")
        assert env.reset(seed=0)
        env.close()

    def test_one_that_never_ends_is_ended(self, tmp_path, tokenizer, tokens):
        trainer = make_trainer(tmp_path, tokenizer, partial(Faulty, "crash", 0, tokens.folder), max_turns=3)
        trainer.train()
        assert logged(trainer, "episode/stop/max_turns") == [1.0, 1.0]

    def test_close_that_raises_costs_nothing(self, tmp_path, tokenizer, caplog):
        class Sulky(Corridor):
            def close(self):
                raise OSError("no")

        trainer = make_trainer(tmp_path, tokenizer, Sulky)
        trainer.train()
        trainer._player.environments.close()
        for worker in trainer._player.environments._closing:
            worker.join(60)
        assert logged(trainer, "episode/stop/failure") == [0.0, 0.0]
        assert sum("Closing an environment failed" in record.message for record in caplog.records) == 8


class TestTooMany:
    def test_a_broken_step_is_one_line_before_the_error(self, tmp_path, tokenizer, caplog):
        class Broken(Corridor):
            def step(self, action):
                raise NameError("name 'plase' is not defined")

        trainer = make_trainer(tmp_path, tokenizer, Broken)
        with pytest.raises(RuntimeError, match="8 of 8 episodes failed"):
            trainer.train()
        lines = [message for message in caplog.messages if "plase" in message]
        assert lines == [
            "16 attempts to play one of 8 episodes failed (crash), 8 episodes are left out. The first: crash after 0 turns: "
            "NameError: name 'plase' is not defined"
        ]

    def test_training_stops_with_a_checkpoint_and_the_first_cause(self, tmp_path, tokenizer, tokens):
        def make():
            factory = partial(Faulty, "crash", 2, tokens.folder)
            return make_trainer(tmp_path, tokenizer, factory, max_steps=3, env_max_retries=0)

        trainer = make()

        class FromTheSecondStepOn(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                tokens(5)

        trainer.add_callback(FromTheSecondStepOn())
        message = (
            r"(?s)5 of 8 episodes failed.*max_failed_fraction=0.5.*crash after 1 turns: RuntimeError: the simulator "
            r"crashed.*failures.jsonl.*checkpoint-1"
        )
        with pytest.raises(RuntimeError, match=message):
            trainer.train()
        assert trainer.state.global_step == 1
        saved = json.loads((tmp_path / "checkpoint-1" / "entropy_history.json").read_text())
        assert saved["step"] == 0  # the RL step that failed has not happened
        resumed = make()
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 3
        assert (resumed.entropy_history.step, len(resumed.entropy_history.means)) == (2, 2)
        assert logged(resumed, "faults/crash") == [0.0, 5.0, 5.0]
        assert logged(resumed, "episode/stop/failure") == [0.0, 0.0, 0.0]

    def test_a_checkpoint_that_is_there_is_not_put_at_risk(self, tmp_path, tokenizer, tokens):
        def make():
            factory = partial(Faulty, "crash", 1, tokens.folder)
            return make_trainer(tmp_path, tokenizer, factory, max_steps=2, env_max_retries=0)

        tokens(5)
        with pytest.raises(RuntimeError, match="5 of 8 episodes failed"):
            make().train()
        before = (tmp_path / "checkpoint-0" / "manifest.json").stat().st_mtime_ns
        resumed = make()
        resumed.add_callback(When("on_step_begin", 0, lambda: limit_files(0)))
        tokens(5)
        try:
            with pytest.raises(RuntimeError, match="(?s)5 of 8 episodes failed.*checkpoint-0"):
                resumed.train(resume_from_checkpoint=True)
        finally:
            limit_files()
        assert (tmp_path / "checkpoint-0" / "manifest.json").stat().st_mtime_ns == before
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-0")

    def test_at_the_very_beginning(self, tmp_path, tokenizer, tokens):
        trainer = make_trainer(
            tmp_path, tokenizer, partial(Faulty, "crash", 1, tokens.folder), env_max_retries=0, max_failed_fraction=0.0
        )
        tokens(1)
        with pytest.raises(RuntimeError, match="1 of 8 episodes failed.*0.0"):
            trainer.train()
        assert (tmp_path / "checkpoint-0" / "trainer_state.json").exists()

    def test_a_fraction_that_is_allowed(self, tmp_path, tokenizer, tokens):
        trainer = make_trainer(tmp_path, tokenizer, partial(Faulty, "crash", 2, tokens.folder), env_max_retries=0)
        tokens(4)
        trainer.train()
        assert logged(trainer, "episode/stop/failure") == [0.5, 0.0]


class TestBeforeTraining:
    @pytest.mark.parametrize("where", ["factory", "reset"])
    def test_a_hang_is_an_error(self, tmp_path, tokenizer, where):
        class Hanging(Corridor):
            def __init__(self):
                super().__init__()
                if where == "factory":
                    threading.Event().wait()

            def reset(self, **kwargs):
                threading.Event().wait()

        with pytest.raises((ValueError, TimeoutError), match="no answer in 0.5 seconds.*env_timeout"):
            make_trainer(tmp_path, tokenizer, Hanging, env_timeout=0.5)


@pytest.mark.jvm
@pytest.mark.parametrize(
    ("signal_number", "kind"), [(signal.SIGKILL, "process_died"), (signal.SIGSTOP, "timeout")], ids=["kill", "stop"]
)
def test_scienceworlds_java_process(tmp_path, tokenizer, tokens, signal_number, kind):
    class Shot(ScienceWorld):
        """Its Java process meets with a signal in the midst of a batch."""

        def step(self, action):
            if self._turn == 1:
                with suppress(FileNotFoundError):  # all eight look for the one token at the same time
                    Path(tokens.folder, "0").unlink()
                    os.kill(self._world.jvm.process.pid, signal_number)
            return super().step(action)

    rows = Dataset.from_dict({"task": ["boil"] * 2, "variation": [0, 1]})
    trainer = make_trainer(
        tmp_path, tokenizer, lambda: Shot("boil", 0, turns=3, instructions=None), rows=rows, max_failed_fraction=0.0
    )
    if kind == "timeout":
        hurry(trainer, 10.0)
    tokens(1)
    trainer.train()
    # All environments of the process share it: each loses its episode, and gets it again in another one.
    (first, second) = logged(trainer, "faults/retried")
    assert 1 <= first == second <= 8
    assert logged(trainer, f"faults/{kind}")[0] >= 1
    assert logged(trainer, "episode/stop/failure") == [0.0, 0.0]
    assert logged(trainer, "episode/turns") == [3.0, 3.0]


@pytest.mark.jvm
def test_a_call_in_java_without_end_costs_its_own_episode(tmp_path, tokenizer, tokens):
    class Stuck(ScienceWorld):
        """One call never returns, while Java answers others."""

        def step(self, action):
            if self._turn == 1:
                with suppress(FileNotFoundError):
                    Path(tokens.folder, "0").unlink()
                    with self._world.use():
                        self._world.simulator.gateway.jvm.java.lang.Thread.sleep(10**9)
            return super().step(action)

    rows = Dataset.from_dict({"task": ["boil"] * 2, "variation": [0, 1]})
    trainer = make_trainer(
        tmp_path, tokenizer, lambda: Stuck("boil", 0, turns=3, instructions=None), rows=rows, env_max_retries=0
    )
    hurry(trainer, 10.0)
    tokens(1)
    trainer.train()
    # Some shared the simulator with it, perhaps waiting for it all the time, others the process.
    assert logged(trainer, "faults/timeout") == [1.0, 1.0]
    assert logged(trainer, "episode/stop/failure") == [1 / 8, 0.0]
    num_others = logged(trainer, "faults/neighbour")[-1]
    assert 1 <= num_others <= 7
    assert logged(trainer, "faults/retried") == [num_others] * 2
    for failure in failures(tmp_path):
        assert failure["retried"] == (failure["kind"] == "neighbour")
        assert ("killed, since it gave one of its environments no answer" in failure["cause"]) == failure["retried"]
