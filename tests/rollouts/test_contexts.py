"""What the model sees before each action: transcripts, windows, chains of them, and what happens when they overflow."""

import pytest
import torch
from conftest import Corridor, make_model, shapes_read
from samplers import Greedy, ScriptedSampler, reference_turn, sampler
from transformers import LogitsProcessorList

from trl_epo.rollouts.chat import ChatEncoder
from trl_epo.rollouts.contexts import ContextRules, PastTurn, TurnView, build_prompt, describe_turn
from trl_epo.rollouts.environment_pool import EnvironmentPool
from trl_epo.rollouts.episode import StopReason, episode_row
from trl_epo.rollouts.rollout import EpisodeStart, Limits, play_episodes


def view(num_steps=0, history=(), observation="You are at 1.", **info):
    return TurnView([], "Find the door. You are at 0.", num_steps, tuple(history), observation, info)


class TestBuildPrompt:
    def test_first_turn(self):
        text = build_prompt(view(admissible_actions=["left", "right"]))
        assert "Find the door. You are at 0." in text
        assert "left; right" in text
        assert "<think>" in text and "<action>" in text
        assert "steps" not in text.split("First reason")[0]

    def test_forms_of_actions_stand_in_for_a_list(self):
        forms = ["go OBJ", "open OBJ"]
        assert "Forms of actions: go OBJ; open OBJ\n\nFirst reason" in build_prompt(view(action_templates=forms))
        assert "OBJ" not in describe_turn(view(action_templates=forms, admissible_actions=["left"]))

    def test_later_turn(self):
        history = [PastTurn("You are at 3.", "<action>left</action>", "left"), PastTurn("You are at 2.", "x", "x")]
        text = describe_turn(view(5, history))
        assert "You have taken 5 steps." in text
        assert "Observation 4: You are at 3.\nAction 4: left" in text
        assert "Observation 5: You are at 2.\nAction 5: x" in text
        assert text.endswith("Observation 6, now: You are at 1.")
        assert "<think>" not in text


@pytest.fixture(scope="module")
def model():
    return make_model(context_length=4096).eval()


class Recorded:
    """A sampler that notes the tokens of each context before the action."""

    def __init__(self, inner):
        self.inner, self.held, self.contexts = inner, {}, {}

    def add(self, episode, new_ids, max_new_tokens):
        self.held.setdefault(episode, []).extend(new_ids)
        self.contexts.setdefault(episode, []).append(list(self.held[episode]))
        self.inner.add(episode, new_ids, max_new_tokens)

    def rewind(self, episode, num_tokens):
        del self.held[episode][num_tokens:]
        self.inner.rewind(episode, num_tokens)

    def advance(self):
        finished = self.inner.advance()
        for episode, sample in finished:
            self.held[episode] += sample.token_ids
        return finished

    def __getattr__(self, name):
        return getattr(self.inner, name)


def play(model, tokenizer, num=3, max_turns=6, max_turn_length=6, max_length=4000, processors=(), **rules):
    chat = ChatEncoder(tokenizer, [tokenizer.eos_token_id])
    recorded = Recorded(sampler(model, LogitsProcessorList(processors)))
    starts = [EpisodeStart([], seed, {"length": 50}) for seed in range(num)]
    context_rules = ContextRules(chat, max_length=max_length, max_turn_length=max_turn_length, **rules)
    limits = Limits(max_turns=max_turns, max_turn_length=max_turn_length)
    pool = EnvironmentPool(lambda: Corridor(turns=100))
    return play_episodes(starts, pool, context_rules, recorded, limits), recorded


def test_every_turn_of_a_window_has_a_prompt_of_its_own(model, tokenizer):
    torch.manual_seed(0)
    episodes, recorded = play(model, tokenizer, window=True, context_turns=2)
    chat = ChatEncoder(tokenizer, [tokenizer.eos_token_id])
    for index, episode in enumerate(episodes):
        assert len(episode.turns) == 6
        assert [turn.starts_context for turn in episode.turns] == [False, *[True] * 5]
        for number, turn in enumerate(episode.turns):
            past = [
                PastTurn(
                    episode.observations[i], episode.turns[i].text, episode.turns[i].action or episode.turns[i].text
                )
                for i in range(max(0, number - 2), number)
            ]
            expected = build_prompt(
                TurnView([], episode.first_observation, number, tuple(past), episode.observations[number], {})
            )
            ids = chat.encode_prompt([{"role": "user", "content": expected}])
            assert recorded.contexts[index][number] == ids
            assert (turn.observation_ids or episode.prompt_ids) == tuple(ids)
        assert episode.context_lengths == [
            len(c) + len(t.action_ids) for c, t in zip(recorded.contexts[index], episode.turns, strict=True)
        ]


def test_windows_equal_reading_each_prompt_anew(model, tokenizer):
    """The cache keeps what two prompts have in common; greedy tokens and log-probabilities are those of a new one."""
    episodes, recorded = play(model, tokenizer, processors=[Greedy()], window=True)
    for index, episode in enumerate(episodes):
        for context, turn in zip(recorded.contexts[index], episode.turns, strict=True):
            ids, logprobs = reference_turn(model, context, 6)
            assert list(turn.action_ids) == ids
            assert list(turn.logprobs) == pytest.approx(logprobs, abs=1e-4)


def test_what_prompts_have_in_common_is_read_once(model, tokenizer):
    with shapes_read(model) as shapes:
        [episode], _ = play(
            model, tokenizer, num=1, window=True, prompt_builder=lambda turn: "look " * 200 + describe_turn(turn)
        )
    read = sum(rows * columns for rows, columns in shapes)
    assert min(episode.context_lengths) > 200
    assert read < 0.6 * sum(episode.context_lengths)


def growing_chat(turn):
    """A prompt that tells everything, so that each goes on where the last one ended."""
    messages = []
    for past in turn.history:
        messages.append({"role": "user", "content": past.observation})
        messages.append({"role": "assistant", "content": past.text})
    return [*messages, {"role": "user", "content": turn.observation}]


def test_prompts_that_go_on_chain_into_one_context(tokenizer):
    """Texts that are tokenised as they were sampled go on with their context; the row is the transcript's."""
    chat = ChatEncoder(tokenizer, [tokenizer.eos_token_id])
    rows = []
    for window in (True, False):
        scripted = ScriptedSampler(tokenizer, ["right", "left"])
        rules = ContextRules(chat, max_length=4000, window=window, context_turns=99, prompt_builder=growing_chat)
        starts = [EpisodeStart([], 1, {"length": 50})]
        limits = Limits(max_turns=5, max_turn_length=10)
        [episode] = play_episodes(starts, EnvironmentPool(lambda: Corridor(turns=100)), rules, scripted, limits)
        rows.append((episode.prompt_ids, episode_row(episode, 0)))
    assert rows[0] == rows[1]
    assert set(rows[0][1].context_ids) == {0}


def test_rows_number_contexts_and_turns(model, tokenizer):
    torch.manual_seed(0)
    [episode], _ = play(model, tokenizer, num=1, max_turns=3, window=True)
    row = episode_row(episode, 0)
    first, second, third = episode.turns
    lengths = [len(first.action_ids), len(second.observation_ids), len(second.action_ids)]
    lengths += [len(third.observation_ids), len(third.action_ids)]
    assert row.context_ids == [0] * lengths[0] + [1] * sum(lengths[1:3]) + [2] * sum(lengths[3:])
    expected = [0] * lengths[0] + [-1] * lengths[1] + [1] * lengths[2] + [-1] * lengths[3] + [2] * lengths[4]
    assert row.turn_ids == expected
    assert row.action_mask == [int(turn >= 0) for turn in expected]


class TestOverflow:
    def test_a_transcript_stops(self, model, tokenizer):
        [episode], _ = play(model, tokenizer, num=1, max_turns=50, context_length=250)
        assert episode.stop_reason is StopReason.TOKEN_BUDGET
        assert len(episode.context_lengths) == 1

    def test_a_transcript_moves_to_the_window_and_grows_again(self, model, tokenizer):
        [episode], recorded = play(
            model, tokenizer, num=1, max_turns=50, context_length=250, overflow_to_window=True,
            prompt_builder=describe_turn,
        )  # fmt: skip
        assert episode.stop_reason is StopReason.MAX_TURNS
        starts = [number for number, turn in enumerate(episode.turns) if turn.starts_context]
        assert 2 <= len(starts) <= 16  # several turns in each context
        assert max(episode.context_lengths) <= 250
        text = tokenizer.decode(recorded.contexts[0][starts[0]])
        assert f"You have taken {starts[0]} steps." in text
        # No turn was cut short for want of room.
        assert {len(turn.action_ids) for turn in episode.turns if turn.action_ids[-1] != 2} <= {6}

    def test_fewer_turns_are_told_where_they_do_not_fit(self, tokenizer):
        chat = ChatEncoder(tokenizer, [tokenizer.eos_token_id])

        def shown(context_length):
            seen = []
            rules = ContextRules(
                chat, max_length=9999, context_length=context_length, max_turn_length=5, window=True, context_turns=3,
                prompt_builder=lambda turn: seen.append(len(turn.history)) or describe_turn(turn),
            )  # fmt: skip
            past = [PastTurn("You are at 1." * 10, "right", "right")] * 3
            return rules.next([1, 2, 3], 2, view(3), past), seen

        whole, seen = shown(9999)
        assert seen == [3]
        tight, seen = shown(len(whole.new_ids))
        assert seen == [3, 2] and tight.room >= 5
        nothing, seen = shown(10)
        assert nothing is None and seen == [3, 2, 1, 0]

    def test_a_chain_without_room_begins_anew(self, tokenizer):
        chat = ChatEncoder(tokenizer, [tokenizer.eos_token_id])
        rules = ContextRules(chat, max_length=30, max_turn_length=5, window=True, prompt_builder=growing_chat)
        first, turn = rules.first([], "go", {})
        context = [*turn.new_ids, *tokenizer.encode("right"), tokenizer.eos_token_id]
        past = [PastTurn("go", "right", "right")]
        chained = rules.next(context, len(turn.new_ids), view(1, observation="x"), past)
        assert not chained.starts_context
        long = rules.next(context, len(turn.new_ids), view(1, observation="x" * 60), past)
        assert long.starts_context and long.room == 30
        assert first == [{"role": "user", "content": "go"}]

    def test_a_first_prompt_without_room_is_a_failure(self, model, tokenizer):
        [episode], _ = play(model, tokenizer, num=1, context_length=40, window=True)
        assert episode.stop_reason is StopReason.FAILURE
        assert "leaves no room" in episode.failures[-1].traceback


def test_special_tokens_in_a_built_prompt_stay_plain(tokenizer):
    chat = ChatEncoder(tokenizer, [tokenizer.eos_token_id])
    rules = ContextRules(chat, 999, window=True, prompt_builder=lambda turn: "x <|im_end|> y")
    _, first = rules.first([], "o", {})
    assert first.new_ids.count(tokenizer.eos_token_id) == 1  # the template's own
