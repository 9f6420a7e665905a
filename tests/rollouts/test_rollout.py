"""Episodes: their turns, their ends, and what a fault costs. Environments are real; only the policy is scripted."""

import math
import threading
import time
from concurrent.futures import wait
from itertools import count

import gymnasium
import numpy as np
import pytest
from conftest import CHATML, Corridor, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from samplers import ScriptedSampler
from tokenizers import AddedToken

from trl_epo.envs import TextEnv
from trl_epo.envs.base import NeighbourTimeout
from trl_epo.rollouts import rollout
from trl_epo.rollouts.chat import ChatEncoder
from trl_epo.rollouts.contexts import ContextRules, add_observation
from trl_epo.rollouts.environment_pool import EnvironmentPool
from trl_epo.rollouts.episode import EpisodeSummary, StopReason, episode_row
from trl_epo.rollouts.failures import FailureKind
from trl_epo.rollouts.rollout import EpisodeStart, Limits, parse_action, parse_tagged_action, play_episodes


@pytest.fixture
def samplers():
    """The samplers that `play` has used."""
    return []


@pytest.fixture
def play(tokenizer, samplers):
    def play(
        factory,
        texts=("right",),
        num=1,
        parser=parse_action,
        prompt=(),
        options=None,
        names=None,
        timeout=math.inf,
        chat=None,
        **limits,
    ):
        limits = {"max_turns": 10, "max_turn_length": 20, **limits}
        rules = {"max_length": limits.pop("max_episode_length", 500), "max_turn_length": limits["max_turn_length"]}
        for name in ("context_length", "window", "overflow_to_window", "context_turns", "prompt_builder"):
            if name in limits:
                rules[name] = limits.pop(name)
        names = names or [None] * num
        starts = [EpisodeStart(list(prompt), seed=5, options=options or {}, environment=name) for name in names]
        chat = chat or ChatEncoder(tokenizer, [tokenizer.eos_token_id])
        sampler = ScriptedSampler(chat.tokenizer, texts)
        samplers.append(sampler)
        pool = EnvironmentPool(factory, timeout)
        return play_episodes(starts, pool, ContextRules(chat, **rules), sampler, Limits(**limits), parser)

    return play


class TestParseAction:
    @pytest.mark.parametrize(
        ("text", "action"),
        [
            ("<action>open door</action>", "open door"),
            ("<think>hm</think>\n<action> open\n</action> bye", "open"),
            ("<think>left?</think>\n\nopen", "open"),
            ("the template wrote the tag</think>open", "open"),
            ("<think>a</think>left<think>b</think>open", "open"),
            ("<think><action>left</action></think>open", "open"),
            ("<think><action>left</action></think>", None),
            ("<think>perhaps I should go left", None),
            ("<action>left</action><think>or perhaps", None),
            ("<action>first</action><action>second</action>", "second"),
            ("  open door\n", "open door"),
            ("<action>cut by the limit", "<action>cut by the limit"),
            ("<action>  </action>", None),
            ("", None),
            (" \n", None),
        ],
    )
    def test_examples(self, text, action):
        assert parse_action(text) == action

    def test_tagged(self):
        assert parse_tagged_action("<think>hm</think><action> open door </action>") == "open door"
        assert parse_tagged_action("<action></action>") is None
        assert parse_tagged_action("open door") is None
        assert parse_tagged_action("<action>open door") is None
        assert parse_tagged_action("<think><action>left</action></think>open door") is None
        assert parse_tagged_action("<think><action>left</action></think><action>open</action>") == "open"
        assert parse_tagged_action("<think><action>left</action>") is None

    @given(st.text())
    def test_never_raises_and_never_returns_blank(self, text):
        action = parse_action(text)
        assert action is None or action.strip()


class TestAddObservation:
    def test_joins_the_last_user_message(self):
        prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        assert add_observation(prompt, "o") == [prompt[0], {"role": "user", "content": "u\n\no"}]
        assert prompt[1]["content"] == "u"  # the dataset's row is left alone

    def test_becomes_a_user_message(self):
        system = {"role": "system", "content": "s"}
        assert add_observation([system], "o") == [system, {"role": "user", "content": "o"}]
        assert add_observation([], "o") == [{"role": "user", "content": "o"}]
        assert add_observation([{"role": "user", "content": ""}], "o") == [{"role": "user", "content": "o"}]


class TestEnds:
    def test_terminated_with_success(self, play):
        (episode,) = play(Corridor)
        assert episode.stop_reason is StopReason.TERMINATED
        assert episode.success is True
        assert episode.episode_return == 1.0
        assert episode.task == "door 3"

    def test_truncated_by_the_environment(self, play):
        (episode,) = play(lambda: Corridor(turns=4), texts=["left"])
        assert episode.stop_reason is StopReason.TRUNCATED
        assert len(episode.turns) == 4
        assert episode.success is False

    def test_max_turns(self, play):
        (episode,) = play(Corridor, parser=lambda text: "x", max_turns=2)
        assert (episode.stop_reason, len(episode.turns)) == (StopReason.MAX_TURNS, 2)

    def test_token_budget_counts_observations_and_is_never_exceeded(self, play, tokenizer):
        for budget in range(1, 80):
            (episode,) = play(lambda: Corridor(turns=50), parser=lambda text: "x", max_episode_length=budget)
            row = episode_row(episode, 0)
            assert len(row.completion_ids) <= budget
            assert episode.stop_reason in (StopReason.TOKEN_BUDGET, StopReason.MAX_TURNS)
        assert len(episode.turns) > 3

    def test_context_length_counts_the_prompt_too(self, play):
        (episode,) = play(lambda: Corridor(turns=50), parser=lambda text: "x", context_length=70)
        assert episode.stop_reason is StopReason.TOKEN_BUDGET
        assert len(episode.prompt_ids) + len(episode_row(episode, 0).completion_ids) <= 70

    def test_prompt_that_fills_the_context_fails_its_episode(self, play):
        (episode,) = play(Corridor, context_length=5)
        assert episode.failed
        assert "no room for an action" in episode.failures[-1].traceback

    def test_turn_cut_by_its_limit_still_acts(self, play, tokenizer):
        (episode,) = play(lambda: Corridor(length=99), texts=["right right right"], max_turn_length=1)
        assert all(len(turn.action_ids) == 1 for turn in episode.turns)
        assert episode.turns[0].action is not None
        assert episode.turns[1].observation_ids[0] == tokenizer.eos_token_id  # the template ends the turn


class TestRows:
    def test_layout(self, play, tokenizer):
        (episode,) = play(lambda: Corridor(length=99), texts=["right", "left", "right"], parser=lambda text: text)
        row = episode_row(episode, 0)
        assert len(row.completion_ids) == len(row.action_mask) == len(row.turn_ids) == len(row.logprobs)
        for index, turn in enumerate(episode.turns):
            positions = [i for i, turn_id in enumerate(row.turn_ids) if turn_id == index]
            assert [row.completion_ids[i] for i in positions] == list(turn.action_ids)
            assert all(row.action_mask[i] == 1 and row.logprobs[i] == -0.5 for i in positions)
        observed = [i for i, turn_id in enumerate(row.turn_ids) if turn_id == -1]
        assert all(row.action_mask[i] == 0 and row.logprobs[i] == 0.0 for i in observed)
        text = tokenizer.decode([*episode.prompt_ids, *row.completion_ids])
        first, answer = episode.prompt[-1]["content"], episode.turns[0].observation
        assert text.startswith(
            f"<|im_start|>user\n{first}<|im_end|>\n<|im_start|>assistant\nright<|im_end|>\n"
            f"<|im_start|>user\n{answer}<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_messages(self, play):
        (episode,) = play(lambda: Corridor(length=99), texts=["right", "left", "right"], parser=lambda text: text)
        roles = [message["role"] for message in episode.completion]
        assert roles == ["assistant", "user"] * (len(episode.turns) - 1) + ["assistant"]


class TestInvalidActions:
    def test_none_is_counted_and_answered_by_the_environment(self, play):
        (episode,) = play(lambda: Corridor(length=99), texts=["right", " "], max_turns=2)
        start = int(episode.prompt[-1]["content"].split()[3][:-1])
        assert [turn.invalid for turn in episode.turns] == [False, True]
        assert episode.turns[1].action is None
        assert episode.turns[1].observation == f"You are at {start}."  # one step right, one (the empty action) left
        assert episode.num_invalid_actions == 1


class TestThoughts:
    OPENS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")

    @pytest.fixture(params=[None, False, True], ids=["no tokens", "plain tokens", "special tokens"])
    def thinking(self, request):
        """A tokenizer whose template opens a thought; the tags are ordinary text or tokens of their own."""
        tokenizer = make_tokenizer(self.OPENS)
        if request.param is not None:
            tokenizer.add_tokens([AddedToken(tag, special=request.param) for tag in ("<think>", "</think>")])
        return tokenizer

    def actions(self, play, tokenizer, texts, **kwargs):
        chat = ChatEncoder(tokenizer, [tokenizer.eos_token_id])
        kwargs = {"max_turns": len(texts), "max_turn_length": 100, "max_episode_length": 2000, **kwargs}
        (episode,) = play(lambda: Corridor(length=99, turns=50), texts, chat=chat, **kwargs)
        assert [turn.text for turn in episode.turns] == texts
        assert [turn.invalid for turn in episode.turns] == [turn.action is None for turn in episode.turns]
        return [turn.action for turn in episode.turns], [turn.cut_thought for turn in episode.turns]

    @pytest.mark.parametrize("parser", [parse_action, parse_tagged_action])
    def test_of_a_template_that_opens_them(self, play, thinking, parser):
        texts = ["left</think><action>right</action>", "I could go <action>left</action>", "<think>", "hm</think>"]
        actions, cut = self.actions(play, thinking, texts, parser=parser)
        assert actions == ["right", None, None, None]
        assert cut == [False, True, True, False]

    def test_of_a_model_that_opens_them(self, play, tokenizer):
        texts = ["<think>left</think>right", "<think>left", "right"]
        assert self.actions(play, tokenizer, texts) == (["right", None, "right"], [False, True, False])

    def test_other_parsers_get_the_whole_text(self, play, thinking):
        texts = ["left</think>right", "I could go left"]
        actions, cut = self.actions(play, thinking, texts, parser=lambda text: text)
        assert actions == texts
        assert cut == [False, True]

    def test_are_counted(self, play, thinking):
        (episode,) = play(
            lambda: Corridor(length=99),
            ["I could go left, or right"],
            chat=ChatEncoder(thinking, [thinking.eos_token_id]),
            max_turns=3,
            max_turn_length=2,
        )
        assert episode.num_cut_thoughts == episode.num_invalid_actions == 3
        assert EpisodeSummary.of(episode).num_cut_thoughts == 3


def test_group_starts_from_the_same_state(play):
    episodes = play(lambda: Corridor(length=1000), num=6, parser=lambda text: "x", max_turns=1)
    assert len({episode.prompt[-1]["content"] for episode in episodes}) == 1


def test_options_reach_reset(play):
    (episode,) = play(Corridor, options={"length": 77})
    assert "The door is at 77." in episode.prompt[-1]["content"]


class Faulty(Corridor):
    """Does something wrong, at a given step (0: in `reset`)."""

    def __init__(self, fault, at, closed=None):
        super().__init__()
        self.fault, self.at, self.closed = fault, at, closed or threading.Event()

    def reset(self, **kwargs):
        answer = super().reset(**kwargs)
        return self.fault(*answer) if self.at == 0 else answer

    def step(self, action):
        answer = super().step("x")
        return self.fault(*answer) if self.num_steps == self.at else answer

    def close(self):
        self.closed.set()
        raise OSError("close failed as well")


def crash(*answer):
    raise RuntimeError("the simulator crashed")


FAULTS = [
    pytest.param(crash, "the simulator crashed", id="raises"),
    pytest.param(lambda *answer: (42, *answer[1:]), "must be a `str`", id="observation is no text"),
    pytest.param(lambda *answer: None, "returned None", id="nothing"),
    pytest.param(lambda *answer: (*answer[:-1], None), "must be a `dict`", id="info is no dict"),
]
STEP_FAULTS = [
    pytest.param(lambda o, r, *rest: (o, float("nan"), *rest), "must be finite", id="reward is NaN"),
    pytest.param(lambda o, r, *rest: (o, 1e39, *rest), "must be finite", id="reward is too large for TRL"),
    pytest.param(lambda o, r, *rest: (o, "much", *rest), "must be a number", id="reward is no number"),
    pytest.param(lambda o, r, *rest: (o, 10**400, *rest), "must be a number", id="reward is no float"),
    pytest.param(lambda o, r, *rest: (o, r, True), r"terminated, truncated, info", id="three values"),
]


class TestFaults:
    def test_waiting_does_not_keep_the_processor_busy(self, play, monkeypatch):
        class Slow(Corridor):
            def step(self, action):
                if self.num_steps == 1:
                    time.sleep(0.5)
                return super().step(action)

        actions, waits = count(), count()

        def parser(text):
            if next(actions) == 3:  # the quick one, who has answered, had until now; the slow one is asked only now
                time.sleep(2.0)
            return text

        monkeypatch.setattr(rollout, "wait", lambda *args: next(waits) < 0 or wait(*args))
        factories = {"quick": lambda: Corridor(99), "slow": lambda: Slow(99)}
        quick, slow = play(factories, names=list(factories), parser=parser, max_turns=2, timeout=2.0)
        assert (quick.failed, slow.failed) == (False, False)
        assert 0 < next(waits) < 20  # instead of thousands

    @pytest.mark.parametrize("at", [0, 1, 3])
    @pytest.mark.parametrize(("fault", "message"), FAULTS)
    def test_costs_its_own_episode_only(self, play, fault, message, at):
        self.check(play, fault, message, at)

    @pytest.mark.parametrize(("fault", "message"), STEP_FAULTS)
    def test_in_a_step(self, play, fault, message):
        self.check(play, fault, message, at=2)

    def check(self, play, fault, message, at):
        closed = threading.Event()
        factories = {"good": lambda: Corridor(turns=4), "bad": lambda: Faulty(fault, at, closed)}
        good, bad, other = play(factories, names=["good", "bad", "good"], parser=lambda text: "x")
        assert bad.failed
        assert message in bad.failures[-1].cause
        assert closed.wait(timeout=60)
        assert (good.failed, other.failed) == (False, False)
        assert len(good.turns) == len(other.turns) == 4
        assert episode_row(bad, placeholder_id=7).completion_ids == [7, 7]
        assert episode_row(bad, placeholder_id=7).action_mask == [0, 0]

    def test_action_parser_that_raises(self, play):
        (episode,) = play(Corridor, parser=lambda text: text.split("never")[1])
        assert "IndexError" in episode.failures[-1].traceback

    def test_the_cause_is_the_error_and_not_its_notes(self, play):
        def noted(*answer):
            error = RuntimeError("the cause")
            error.add_note("a hint")
            raise error

        (episode,) = play(lambda: Faulty(noted, 1, threading.Event()))
        assert episode.failures[-1].cause == "RuntimeError: the cause"
        assert "a hint" in episode.failures[-1].traceback

    @pytest.mark.parametrize(
        "info",
        [
            {"success": np.array([1, 0])},
            {"invalid_action": np.array([1, 0])},
            {"task": type("T", (), {"__str__": lambda self: 1 / 0})()},
        ],
    )
    def test_info_that_cannot_be_read(self, play, info):
        class Odd(Corridor):
            def step(self, action):
                return *super().step(action)[:-1], info

        factories = {"good": lambda: Corridor(turns=4), "bad": Odd}
        good, bad = play(factories, names=["good", "bad"], parser=lambda text: "x")
        assert (good.failed, bad.failed) == (False, True)
        assert bad.failures[-1].kind is FailureKind.INVALID_ANSWER

    def test_exit_with_an_error_that_cannot_be_shown(self, play):
        class Evil(BaseException):
            def __repr__(self):
                raise ValueError

        def fault(*answer):
            raise Evil

        (episode,) = play(lambda: Faulty(fault, 1), parser=lambda text: "x")
        assert "It raised Evil" in episode.failures[-1].traceback

    def test_an_interruption_closes_the_environments_in_use(self, play, samplers):
        closed = [threading.Event() for _ in range(3)]
        names = {
            str(i): lambda event=event: Faulty(lambda *answer: answer, 0, event) for i, event in enumerate(closed)
        }

        def interrupt(text):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            play(names, names=list(names), parser=interrupt)
        assert all(event.wait(timeout=60) for event in closed)

    def test_all_fail(self, play):
        episodes = play(lambda: Faulty(crash, 0), num=2)
        assert all(episode.failed for episode in episodes)

    def test_factory_that_raises(self, play):
        def factory():
            raise OSError("no more processes")

        (episode,) = play(factory)
        assert "no more processes" in episode.failures[-1].traceback


class Waiting(Corridor):
    """Waits for something in each step."""

    def __init__(self, wait, turns):
        super().__init__(length=99, turns=turns)
        self.wait = wait

    def step(self, action):
        self.wait()
        return super().step(action)


def fast_and_slow(turns):
    """An environment of nine turns, and one of so many that waits in each for the end of the former; whether it came."""
    over, waited = threading.Event(), []

    class Fast(Corridor):
        def step(self, action):
            answer = super().step(action)
            if answer[3]:
                over.set()
            return answer

    factories = {
        "fast": lambda: Fast(length=99, turns=9),
        "slow": lambda: Waiting(lambda: waited.append(over.wait(30)), turns=turns),
    }
    return factories, waited


class Sharing(Corridor):
    """Lives in a process with others, of which one call after the other has no end; what ends it ends them all."""

    class Process:
        def __init__(self, num_hangs):
            self.lock = threading.Lock()
            self.num_hangs = num_hangs
            self.begin()

        def begin(self):
            self.killed = threading.Event()
            self.hanging = None

    def __init__(self, process):
        super().__init__(length=99, turns=3)
        self.process = process
        self.killed = process.killed

    def reset(self, **kwargs):
        self.killed = self.process.killed
        return super().reset(**kwargs)

    def step(self, action):
        with self.process.lock:
            if self.process.hanging is None and self.process.num_hangs:
                self.process.hanging = self
                self.process.num_hangs -= 1
        if self.process.hanging is not None:
            self.killed.wait()
        if self.killed.is_set():
            raise NeighbourTimeout
        return super().step(action)

    def interrupt(self):
        killed = self.process.killed
        self.process.begin()
        killed.set()

    @property
    def held_up_by_another(self):
        return self.process.hanging not in (None, self) or self.killed.is_set()


class TestNeighbours:
    @pytest.mark.parametrize(("num_hangs", "max_retries"), [(1, 0), (2, 1)])
    def test_a_time_out_costs_the_others_no_retry(self, play, num_hangs, max_retries):
        process = Sharing.Process(num_hangs)
        episodes = play(lambda: Sharing(process), num=6, timeout=3.0, max_retries=max_retries)
        kinds = [failure.kind for episode in episodes for failure in episode.failures]
        assert kinds.count(FailureKind.TIMEOUT) == num_hangs
        assert kinds.count(FailureKind.NEIGHBOUR) >= 3 * num_hangs
        assert len(kinds) == kinds.count(FailureKind.TIMEOUT) + kinds.count(FailureKind.NEIGHBOUR)
        for episode in episodes:
            own = [failure.kind for failure in episode.failures].count(FailureKind.TIMEOUT)
            assert episode.failed == (own > max_retries)
            assert episode.failed or len(episode.turns) == 3

    def test_an_environment_that_hangs_each_time_comes_to_an_end(self, play):
        process = Sharing.Process(num_hangs=10**6)
        episodes = play(lambda: Sharing(process), num=3, timeout=0.2, max_retries=1)
        kinds = [[failure.kind for failure in episode.failures] for episode in episodes]
        assert all(episode.failed for episode in episodes)
        assert sum(own.count(FailureKind.TIMEOUT) for own in kinds) <= 3 * 2

    @pytest.mark.parametrize("max_retries", [0, 1])
    def test_without_a_time_out_there_is_no_excuse(self, play, max_retries):
        def pretend(*answer):
            raise NeighbourTimeout

        (episode,) = play(lambda: Faulty(pretend, 1), parser=lambda text: "x", max_retries=max_retries)
        assert [failure.kind for failure in episode.failures] == [FailureKind.NEIGHBOUR] * (max_retries + 1)


class TestConcurrency:
    def test_steps_of_a_turn_run_side_by_side(self, play):
        together = threading.Barrier(16, timeout=30)  # one after another they would never pass it
        episodes = play(lambda: Waiting(together.wait, turns=2), num=16)
        assert [len(episode.turns) for episode in episodes] == [2] * 16

    def test_each_environment_sees_one_thread(self, play):
        class OneThread(Corridor):
            def __init__(self):
                super().__init__(length=99, turns=5)
                self.seen = {threading.get_ident()}

            def reset(self, **kwargs):
                self.seen.add(threading.get_ident())
                return super().reset(**kwargs)

            def step(self, action):
                self.seen.add(threading.get_ident())
                observation, *rest, info = super().step(action)
                return observation, *rest, {**info, "success": len(self.seen) == 1}

        assert all(episode.success for episode in play(OneThread, num=8))

    def test_generation_goes_on_without_a_slow_environment(self, play, tokenizer):
        factories, waited = fast_and_slow(2)
        fast, slow, _ = episodes = play(factories, names=["fast", "slow", "fast"], patience=1.0)
        assert waited == [True, True]
        assert [len(episode.turns) for episode in episodes] == [9, 2, 9]
        assert slow.num_late_answers == 1  # at its second answer nobody else is left to go on with
        assert fast.num_late_answers == 0

    @pytest.mark.parametrize(("patience", "num_late"), [(math.inf, 0), (0.0, 1)])
    def test_a_sampler_that_does_not_wait_gets_turns_as_they_come(self, play, monkeypatch, patience, num_late):
        monkeypatch.setattr(ScriptedSampler, "waits_for_turns", False)
        factories, waited = fast_and_slow(1)
        fast, slow = play(factories, names=["fast", "slow"], patience=patience)
        assert waited == [True]
        assert [len(fast.turns), len(slow.turns)] == [9, 1]
        assert slow.num_late_answers - num_late in (0, num_late)  # `reset` may be late too

    def test_an_environment_that_hangs_is_given_up_while_others_are_sampled(self, play, monkeypatch):
        given_up = threading.Event()

        class Hanging(Corridor):
            def step(self, action):
                given_up.wait(30)

            def interrupt(self):
                given_up.set()

        advance, start = ScriptedSampler.advance, time.monotonic()

        def busy_until_then(sampler):
            """The turns of the first episode are sampled for as long as the other one hangs."""
            if 0 in sampler.asked and 1 not in sampler.asked and not given_up.is_set():
                assert time.monotonic() - start < 30
                return []
            return advance(sampler)

        monkeypatch.setattr(ScriptedSampler, "waits_for_turns", False)
        monkeypatch.setattr(ScriptedSampler, "advance", busy_until_then)
        factories = {"good": lambda: Corridor(length=99, turns=4), "hanging": Hanging}
        good, hanging = play(factories, names=["good", "hanging"], timeout=0.3)
        assert len(good.turns) == 4
        assert [failure.kind for failure in hanging.failures] == [FailureKind.TIMEOUT]

    def test_an_answer_is_waited_for_as_long_as_patience_lasts(self, play, samplers):
        slow = lambda: Waiting(lambda: time.sleep(0.1), turns=3)  # noqa: E731
        play({"fast": lambda: Corridor(length=99, turns=3), "slow": slow}, names=["fast", "slow"])
        assert samplers[-1].batches == [[0, 1]] * 3

    def test_no_more_environments_than_concurrent_episodes(self, play, samplers):
        made = []

        def factory():
            made.append(1)
            return Corridor(length=99, turns=3)

        episodes = play(factory, num=7, max_concurrent_episodes=3)
        assert [len(episode.turns) for episode in episodes] == [3] * 7
        assert len(made) == 3
        assert all(len(batch) <= 3 for batch in samplers[-1].batches)
        assert sorted(samplers[-1].dropped) == list(range(7))

    def test_a_place_that_falls_free_is_taken_at_once(self, play, samplers):
        factories = {"short": lambda: Corridor(length=99, turns=1), "long": lambda: Corridor(length=99, turns=3)}
        play(factories, names=["short", "long", "short", "short"], max_concurrent_episodes=2)
        assert samplers[-1].batches == [[0, 1], [1, 2], [1, 3]]


def test_pool_reuses_environments_and_replaces_failed_ones():
    pool = EnvironmentPool(Corridor)
    first = pool.take(None)
    pool.give_back(None, first)
    assert pool.take(None) is first
    assert pool.take(None) is not first


def test_environments_are_gymnasium_environments():
    assert issubclass(TextEnv, gymnasium.Env)
