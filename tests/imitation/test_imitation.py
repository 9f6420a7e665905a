"""Warm-ups: what is learned is what a rollout would have read and said."""

import json
import threading
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CHATML, PATIENT_RUN, Corridor, make_model, make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from samplers import ScriptedSampler

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.envs.household import Household, tasks
from trl_epo.imitation import (
    chat_episodes,
    expert_episodes,
    kept_episodes,
    read_chats,
    teacher_episodes,
    token_rows,
    warm_up,
)
from trl_epo.reports.episode_schema import SCHEMA
from trl_epo.rollouts import play_episodes


SETTINGS = {
    **PATIENT_RUN,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_generations": 4,
    "num_generations_eval": 1,
    "max_turns": 6,
    "max_turn_length": 40,
    "max_steps": 1,
    "learning_rate": 1e-2,
}
WARM_UP = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 100}
ROWS = Dataset.from_dict({"length": [3, 4, 5, 3], "seed": [0, 1, 2, 3]})


def labels_of(rows):
    return [token for row in rows for token in row["labels"] if token != -100]


class Far(Corridor):
    """The corridor, from its beginning."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.place = 0
        return f"You are at 0. The door is at {self.door}.", {"success": False}


class Walk(Far):
    """The same, with an expert that knows where the door is."""

    def expert_action(self):
        return "right"


class Listed(Far):
    """The same, with an expert that has a list of actions."""

    def expert_actions(self):
        return ["right", "focus on door", "right", "right", "right", "right"]


def make_trainer(tmp_path, tokenizer, factory=Walk, rows=ROWS, model=None, trainer_kwargs=None, **kwargs):
    return EPOTrainer(
        model or make_model(),
        args=EPOConfig(str(tmp_path), **{**SETTINGS, **kwargs}),
        train_dataset=rows,
        processing_class=tokenizer,
        environment_factory=factory,
        **(trainer_kwargs or {}),
    )


def tokens(trainer, episodes):
    """What the trainer makes of played episodes."""
    batch = trainer.player._batch(episodes, 0)
    return batch.prompt_ids, batch.completion_ids, batch.action_mask, batch.context_ids


class TestEpisodes:
    @pytest.mark.parametrize("context", ["transcript", "window"])
    def test_tokens_are_those_of_a_rollout_of_the_same_actions(self, tmp_path, tokenizer, context):
        rows = tasks("train", 3, rooms=2, turns=12)
        trainer = make_trainer(
            tmp_path, tokenizer, Household, rows, make_model(context_length=8192), context=context, max_turns=12
        )
        demonstrated = expert_episodes(trainer, rows)
        assert all(episode.success for episode in demonstrated)
        for row, episode in zip(rows, demonstrated, strict=True):
            said = ScriptedSampler(tokenizer, [turn.text for turn in episode.turns])
            said.rewind = lambda episode, num_tokens: None
            player = trainer.player
            start = player.start(row, "train", 0, 0, 0)
            (rollout,) = play_episodes(
                [start], player.environments, player.rules, said, player.limits, player.action_parser
            )
            assert tokens(trainer, [rollout]) == tokens(trainer, [episode])
            assert all(turn.action_ids[-1] == tokenizer.eos_token_id for turn in rollout.turns)
            assert all(("<action>" in turn.text) == (context == "window") for turn in rollout.turns)

    def test_several_environments(self, tmp_path, tokenizer):
        """An environment is made once for all of its rows; what is said is said by the one that plays."""
        names = ["walk", "listed", "walk", "listed"]
        rows = Dataset.from_dict({"environment": names, "length": [3, 5, 4, 5]})
        trainer = make_trainer(tmp_path, tokenizer, {"walk": Walk, "listed": Listed}, rows)
        episodes = expert_episodes(trainer, rows)
        assert [episode.environment for episode in episodes] == names
        said = [[turn.text for turn in episode.turns] for episode in episodes]
        listed = ["right", "look around", "focus on door", "right", "right"]
        assert said == [["right"] * 3, listed, ["right"] * 4, listed]

    def test_rows(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer)
        (episode,) = expert_episodes(trainer, [{"length": 4, "seed": 1}])
        (row,) = token_rows(episode)
        learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert learned == [token for turn in episode.turns for token in turn.action_ids]
        assert tokenizer.decode(learned) == "right<|im_end|>" * len(episode.turns)
        text = tokenizer.decode(row["input_ids"])
        assert text.startswith("<|im_start|>user\nYou are at")
        assert text.endswith("right<|im_end|>")
        (everything,) = token_rows(episode, learn_observations=True)
        assert everything["labels"] == everything["input_ids"] == row["input_ids"]

    def test_a_window_is_a_row_for_each_turn(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer, context="window", model=make_model(context_length=4096))
        (episode,) = expert_episodes(trainer, [{"length": 5, "seed": 2}])
        rows = token_rows(episode)
        assert len(rows) == len(episode.turns) > 1
        for row, turn, length in zip(rows, episode.turns, episode.context_lengths, strict=True):
            assert len(row["input_ids"]) == length
            assert tuple(label for label in row["labels"] if label != -100) == turn.action_ids

    def test_a_list_of_actions(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer, Listed)
        episodes = expert_episodes(trainer, [{"length": 5, "seed": 2}])
        texts = [turn.text for turn in episodes[0].turns]
        assert texts[:4] == ["right", "look around", "focus on door", "right"]
        with pytest.raises(ValueError, match="`noise` wants an expert that can go on from any state.*Listed"):
            expert_episodes(trainer, ROWS, noise=0.5)

    def test_mistakes_of_nothing(self, tmp_path, tokenizer):
        with pytest.raises(
            ValueError, match=r"`noise` is 0.5, but mistakes are made of `info\['admissible_actions'\]`"
        ):
            expert_episodes(make_trainer(tmp_path, tokenizer), ROWS, noise=0.5)

    def test_that_a_limit_cuts_the_expert_short_is_said(self, tmp_path, tokenizer, caplog):
        rows = [{"length": length, "seed": 0} for length in (2, 3, 4)]
        episodes = expert_episodes(make_trainer(tmp_path, tokenizer, max_turns=3), rows)
        assert [episode.success for episode in episodes] == [True, True, False]
        assert "`max_turns` cuts 1 of 3 of the expert's episodes" in caplog.text
        caplog.clear()
        expert_episodes(make_trainer(tmp_path, tokenizer), rows)
        assert "cuts" not in caplog.text

    def test_an_expert_that_has_no_more_to_say_ends_the_episode(self, tmp_path, tokenizer):
        def expert(env):
            texts = iter(["right"])
            return lambda observation, info: next(texts, None)

        (episode,) = expert_episodes(make_trainer(tmp_path, tokenizer), [{"length": 6, "seed": 4}], expert)
        assert (len(episode.turns), episode.stop_reason.value) == (1, "truncated")

    def test_mistakes(self, tmp_path, tokenizer):
        rows = tasks("train", 12, rooms=2, turns=12)
        trainer = make_trainer(tmp_path, tokenizer, Household, rows, make_model(context_length=4096), max_turns=12)
        clean, noisy, again = (expert_episodes(trainer, rows, noise=noise) for noise in (0.0, 0.4, 0.4))
        assert [e.turns for e in noisy] == [e.turns for e in again] != [e.turns for e in clean]
        assert sum(len(e.turns) for e in noisy) > sum(len(e.turns) for e in clean)
        assert sum(bool(e.success) for e in noisy) > 6  # the expert goes on from them
        assert not any(e.mistakes for e in clean)
        assert 0.25 < sum(len(e.mistakes) for e in noisy) / sum(len(e.turns) for e in noisy) < 0.55
        for episode in noisy:
            said = [list(turn.action_ids) for turn in episode.turns]
            right = [ids for turn, ids in enumerate(said) if turn not in episode.mistakes]
            assert labels_of(token_rows(episode)) == sum(right, [])
            (row,) = token_rows(episode, learn_observations=True)
            wrong = sum(len(said[turn]) for turn in episode.mistakes)
            assert row["labels"].count(-100) == wrong
            assert row["input_ids"] == token_rows(episode)[0]["input_ids"]

        read = [e.turns[turn] for e in noisy for turn in e.mistakes]
        assert (
            0.3 < sum(turn.invalid for turn in read) / len(read) < 0.7
        )  # about half of what is read cannot be done …
        learned = expert_episodes(trainer, rows, noise=0.4, learn_mistakes=True)
        assert sum(len(e.turns) for e in learned) > sum(len(e.turns) for e in clean)
        for episode in learned:  # … and all that is learned can
            assert not any(turn.invalid for turn in episode.turns)
            assert labels_of(token_rows(episode)) == [id for turn in episode.turns for id in turn.action_ids]
            (row,) = token_rows(episode, learn_observations=True)
            assert row["input_ids"] == row["labels"]

    def test_windows_of_nothing_but_a_mistake_are_left_out(self, tmp_path, tokenizer):
        rows = tasks("train", 6, rooms=2, turns=12)
        model = make_model(context_length=4096)
        trainer = make_trainer(
            tmp_path, tokenizer, Household, rows, model, max_turns=12, context="window", max_turn_length=80
        )
        episodes = expert_episodes(trainer, rows, noise=0.4)
        assert any(e.mistakes for e in episodes)
        for e in episodes:
            assert len(token_rows(e)) == len(e.turns) - len(e.mistakes)

    def test_noise_of_one(self, tmp_path, tokenizer):
        rows = tasks("train", 2, rooms=2, turns=12)
        trainer = make_trainer(tmp_path, tokenizer, Household, rows, make_model(context_length=4096), max_turns=12)
        with pytest.raises(ValueError, match="`noise` is 1.0"):
            expert_episodes(trainer, rows, noise=1.0)

    def test_an_open_thought_is_closed(self, tmp_path):
        template = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
        trainer = make_trainer(tmp_path, make_tokenizer(template))
        (episode,) = expert_episodes(trainer, [{"length": 4, "seed": 1}])
        assert {(turn.text, turn.action, turn.invalid) for turn in episode.turns} == {
            ("</think>\n\nright", "right", False)
        }

    def test_what_cannot_be_used(self, tmp_path, tokenizer, caplog):
        with pytest.raises(ValueError, match="has no expert: neither `expert_action"):
            expert_episodes(make_trainer(tmp_path, tokenizer, Far), ROWS)
        short = make_trainer(tmp_path, tokenizer, max_turn_length=1)
        with pytest.raises(ValueError, match="`max_turn_length=1` tokens"):
            expert_episodes(short, ROWS)
        number = count()

        def expert(env):
            if next(number) == 0:
                raise OSError("asleep")
            return lambda observation, info: "right"

        trainer = make_trainer(tmp_path, tokenizer, env_max_retries=0)
        assert len(expert_episodes(trainer, ROWS, expert)) == len(ROWS) - 1
        assert "1 of 4 demonstrated episodes are left out: 1 failed" in caplog.text

    def test_chats(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer)
        chat = [
            {"role": "system", "content": "Walk."},
            {"role": "user", "content": "You are at 3."},
            {"role": "assistant", "content": "left<|im_end|>"},
            {"role": "user", "content": "You are at 2."},
            {"role": "assistant", "content": "right"},
        ]
        file = tmp_path / "chats.jsonl"
        file.write_text(json.dumps({"messages": chat}) + "\n\n" + json.dumps(chat) + "\n")
        first, second = chat_episodes(trainer, read_chats(file))
        assert first.turns == second.turns
        (row,) = token_rows(first)
        plain = [{**message, "content": message["content"].replace("<|im_end|>", "?")} for message in chat]
        assert tokenizer.decode(row["input_ids"]).replace("left<|im_end|>", "left?", 1) + "\n" == (
            tokenizer.apply_chat_template(plain, tokenize=False)
        )
        assert row["input_ids"].count(tokenizer.eos_token_id) == 5  # none of them is the chat's own
        with pytest.raises(ValueError, match=r"Chat 0 has messages of the roles \['user', 'user'\]"):
            chat_episodes(trainer, [[chat[1], chat[1]]])
        file.write_text("{}\n{")
        with pytest.raises(ValueError, match="Line 2 of .*chats.jsonl is not JSON"):
            read_chats(file)

    def test_kept_episodes(self, tmp_path, tokenizer):
        def kept(mode, success, seed, texts):
            row = dict.fromkeys(SCHEMA.names)
            turns = [dict.fromkeys(["text"], text) for text in texts]
            row |= {"mode": mode, "success": success, "seed": seed, "options": '{"length": 4}', "turns": turns}
            return row | {"stop_reason": "terminated", "version": 1}

        folder = tmp_path / "run" / "episodes" / "train"
        folder.mkdir(parents=True)
        rows = [
            kept("train", True, 1, ["right", "righter", *["right"] * 4]),
            kept("train", False, 1, ["left"] * 6),
            kept("eval", True, 1, ["right"] * 6),
        ]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "step-000001.parquet")
        dataset = Dataset.from_dict({"length": [4], "prompt": [[{"role": "system", "content": "Walk."}]]})
        trainer = make_trainer(tmp_path, tokenizer, rows=dataset)
        (episode,) = kept_episodes(trainer, tmp_path / "run")
        assert episode.success
        assert [turn.text for turn in episode.turns][:2] == ["right", "righter"]
        assert (episode.seed, episode.options) == (1, {"length": 4})
        assert episode.prompt[0] == {"role": "system", "content": "Walk."}
        assert len(kept_episodes(trainer, tmp_path / "run", success=False)) == 2
        with pytest.raises(ValueError, match="has kept 0 episodes of training"):
            kept_episodes(trainer, tmp_path)

    def test_what_json_does_not_hold_comes_from_the_dataset(self, tmp_path, tokenizer):
        seen = []

        class Dated(Corridor):
            def reset(self, *, seed=None, options=None):
                seen.append(options["day"])
                return super().reset(seed=seed)

        days = Dataset.from_dict({"day": [datetime(2026, 11, day) for day in (1, 2)], "seed": np.array([3, 4])})
        make_trainer(tmp_path, tokenizer, Dated, days, max_steps=1, max_turn_length=3).train()
        trainer = make_trainer(tmp_path, tokenizer, Dated, days)  # has room for what was cut
        seen.clear()
        episodes = kept_episodes(trainer, tmp_path, success=False)
        assert {*seen} == {*days["day"]} and {episode.seed for episode in episodes} == {3, 4}

    def test_lines_within_a_text_are_no_lines_of_the_file(self, tmp_path):
        chat = [{"role": "user", "content": "a\u2028b\x85c\x0cd"}]
        (tmp_path / "chats.jsonl").write_text(json.dumps(chat, ensure_ascii=False) + "\n", encoding="utf-8")
        assert read_chats(tmp_path / "chats.jsonl") == [chat]


class Endpoint(BaseHTTPRequestHandler):
    """Speaks OpenAI's chat API: says "right" to whatever was asked."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.num_refusals:
            self.server.num_refusals -= 1
            self.send_response(429)
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        if self.server.new_name and "max_tokens" in request:
            self.server.num_renamed += 1
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b"Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
            return
        self.server.requests.append((self.path, dict(self.headers), request))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "right"}}
        if self.server.says_nothing:
            choice |= {"finish_reason": "length", "message": {"role": "assistant", "content": None}}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        body = json.dumps(answer | {"usage": None, "system_fingerprint": None}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.requests, server.num_refusals, server.new_name = [], 0, False
    server.num_renamed, server.says_nothing = 0, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class TestTeacher:
    def test_one_that_is_busy_is_asked_again(self, tmp_path, tokenizer, endpoint):
        endpoint.num_refusals = 3
        url = f"http://127.0.0.1:{endpoint.server_port}/v1"
        (episode,) = teacher_episodes(make_trainer(tmp_path, tokenizer), [{"length": 3, "seed": 1}], url)
        assert not episode.failures
        assert len(endpoint.requests) == len(episode.turns)

    def test_one_that_wants_the_bound_by_its_new_name(self, tmp_path, tokenizer, endpoint):
        endpoint.new_name = True
        url = f"http://127.0.0.1:{endpoint.server_port}/v1"
        (episode,) = teacher_episodes(make_trainer(tmp_path, tokenizer), [{"length": 3, "seed": 1}], url)
        assert not episode.failures
        assert {request["max_completion_tokens"] for _, _, request in endpoint.requests} == {4096 + 40}
        assert endpoint.num_renamed == 1  # it is asked once

    def test_one_that_thinks_and_says_nothing(self, tmp_path, tokenizer, endpoint):
        endpoint.says_nothing = True
        url = f"http://127.0.0.1:{endpoint.server_port}/v1"
        with pytest.raises(ValueError, match="said nothing: use a teacher that does not think"):
            teacher_episodes(make_trainer(tmp_path, tokenizer), [{"length": 3, "seed": 1}], url)

    def test_it_is_told_what_the_policy_is_told(self, tmp_path, tokenizer, endpoint, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "secret")
        rows = [{"length": 3, "seed": seed, "prompt": [{"role": "system", "content": "Walk."}]} for seed in range(10)]
        trainer = make_trainer(tmp_path, tokenizer, Far, Dataset.from_list(rows))
        url = f"http://127.0.0.1:{endpoint.server_port}/v1"
        episodes = teacher_episodes(trainer, rows, url, "wise", temperature=0.5)
        assert [episode.options for episode in episodes] == [{"length": 3}] * 10
        assert all(episode.success for episode in episodes)
        assert len(endpoint.requests) == sum(len(episode.turns) for episode in episodes)
        longest = max(episodes, key=lambda episode: len(episode.turns))
        messages = [request["messages"] for _, _, request in endpoint.requests]
        assert [*longest.prompt, *longest.completion[:-1]] in messages
        path, headers, request = endpoint.requests[0]
        assert path == "/v1/chat/completions"
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("wise", 0.5, 40)
        assert "secret" not in str(headers)

    def test_windows(self, tmp_path, tokenizer, endpoint):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            context="window",
            trainer_kwargs={"prompt_builder": lambda turn: f"{len(turn.history)} {turn.observation}"},
            context_turns=1,
        )
        url = f"http://127.0.0.1:{endpoint.server_port}/v1"
        (episode,) = teacher_episodes(trainer, [{"length": 5, "seed": 2}], url)
        asked = [request["messages"] for _, _, request in endpoint.requests]
        assert asked == [
            [{"role": "user", "content": f"{min(number, 1)} {observation}"}]
            for number, observation in enumerate(episode.observations)
        ]

    def test_nobody_is_there(self, tmp_path, tokenizer):
        with pytest.raises(
            ValueError, match="None of the first 4 demonstrated episodes can be used .*cannot be reached: .*refused"
        ):
            teacher_episodes(make_trainer(tmp_path, tokenizer), ROWS, "http://127.0.0.1:9/v1")


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


class TestWarmUp:
    def test_it_stops_at_the_wished_success(self, tmp_path, tokenizer, caplog):
        panel = Dataset.from_dict({"length": [3] * 4})
        panels = {"a": panel, "b": panel}
        trainer = make_trainer(tmp_path, tokenizer, trainer_kwargs={"eval_dataset": panels}, max_turn_length=4)
        episodes = expert_episodes(trainer, ROWS)
        reached = warm_up(trainer, episodes, until_success=0.5, check_every=4, num_train_epochs=60, **WARM_UP)
        assert 0.5 <= reached == trainer.evaluate()["eval_a_episode/success_rate"]
        looks = trainer.state.log_history[:-2]  # without this last evaluation
        assert [(look["step"], look.get("eval_a_episode/success_rate", reached)) for look in looks] == [
            (0, reached)
        ] * 2
        before = weights(trainer)
        assert warm_up(trainer, episodes, until_success=reached, **WARM_UP) == reached
        assert torch.equal(weights(trainer), before)
        assert "without any warm-up" in caplog.text

    def test_it_says_that_it_has_not_come_so_far(self, tmp_path, tokenizer, caplog):
        panel = Dataset.from_dict({"length": [3] * 4})
        trainer = make_trainer(tmp_path, tokenizer, trainer_kwargs={"eval_dataset": panel}, max_turn_length=4)
        episodes = expert_episodes(trainer, ROWS)
        assert warm_up(trainer, episodes, until_success=1.0, **{**WARM_UP, "learning_rate": 0.0}) < 1.0
        assert "The warm-up ends before `until_success=1.0`" in caplog.text

    def test_an_adapter_learns_and_nothing_else(self, tmp_path, tokenizer):
        lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
        trainer = make_trainer(tmp_path, tokenizer, trainer_kwargs={"peft_config": lora})
        base = {name: weight.clone() for name, weight in trainer.model.named_parameters() if "lora_" not in name}
        forward, before = trainer.model.get_base_model().forward, weights(trainer)
        warm_up(trainer, expert_episodes(trainer, ROWS), num_train_epochs=8, **WARM_UP)
        assert not torch.equal(weights(trainer), before)
        assert all(torch.equal(dict(trainer.model.named_parameters())[name], weight) for name, weight in base.items())
        assert trainer.model.get_base_model().forward == forward

    def test_training_goes_on_as_from_the_saved_model(self, tmp_path, tokenizer):
        few = {"gradient_accumulation_steps": 2, "max_steps": 2, "max_turns": 3, "max_turn_length": 4}
        trainer = make_trainer(tmp_path, tokenizer, **few)
        trainer.evaluate(Dataset.from_dict({"length": [3] * 8}))
        warm_up(trainer, expert_episodes(trainer, ROWS), gradient_accumulation_steps=3, **WARM_UP)
        trainer.save_model(tmp_path / "warm")
        trainer.train()
        saved = type(trainer.model).from_pretrained(tmp_path / "warm")
        other = make_trainer(tmp_path, tokenizer, model=saved, **few)
        before = weights(other).clone()
        other.train()
        assert not torch.equal(weights(other), before)
        assert torch.equal(weights(trainer), weights(other))

    def test_what_it_refuses(self, tmp_path, tokenizer):
        trainer = make_trainer(tmp_path, tokenizer)
        episodes = expert_episodes(trainer, ROWS)
        with pytest.raises(ValueError, match="no episodes to learn from"):
            warm_up(trainer, [])
        with pytest.raises(ValueError, match="`until_success` needs an `eval_dataset`"):
            warm_up(trainer, episodes, until_success=0.5)
        with pytest.raises(ValueError, match="`until_success` is 20"):
            warm_up(trainer, episodes, until_success=20)
        args = EPOConfig(str(tmp_path), **{**SETTINGS, "max_turns": 1})
        prompts = Dataset.from_dict({"prompt": ["a"]})
        plain = EPOTrainer(make_model(), lambda **k: [0.0] * 8, args, prompts, processing_class=tokenizer)
        with pytest.raises(ValueError, match="no text environment"):
            warm_up(plain, episodes)
