"""
Tokens through the model for an episode of T turns: one growing transcript, or a window that is built anew each turn.

    python examples/benchmarks/contexts.py --turns 10 30 --json contexts.json

Random admissible actions in a household of four rooms, written as `<think>…</think><action>…</action>`; both ways play the
same episodes, a window with the default prompt, which lists the admissible actions. *read* counts the tokens that the
rollout puts through the model: with the cache kept across turns (and over what two prompts have in common), and without
any cache, as requests would. *trained* counts those of one pass of the loss, *longest* the longest context. No model is
needed to count; `--model` says whose tokenizer.
"""

import random
from dataclasses import asdict, dataclass, field
from statistics import fmean

from common import load, save_json, show
from trl import TrlParser

from trl_epo.envs.household import Household
from trl_epo.rollouts import ChatEncoder, ContextRules, EnvironmentPool, EpisodeStart, Limits, play_episodes
from trl_epo.sampling import Sample


@dataclass
class ContextArguments:
    model: str = field(default="smollm2", metadata={"help": "Whose tokenizer.", "choices": ("smollm2", "tiny")})
    seed: int = field(default=0, metadata={"help": "Of the houses and the actions."})
    json: str | None = field(default=None, metadata={"help": "File for the rows as JSON, rewritten after each."})
    turns: list[int] = field(default_factory=lambda: [10, 30], metadata={"help": "Turns of an episode."})
    episodes: int = field(default=16, metadata={"help": "Episodes to average over."})
    context_turns: int = field(default=2, metadata={"help": "Turns that a window tells about."})


class Endless(Household):
    """A house in which the chore is never done; the last one made knows what is possible now."""

    admissible: list[str] = []

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        Endless.admissible = info["admissible_actions"]
        return observation, info

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        Endless.admissible = info["admissible_actions"]
        return observation, 0.0, False, terminated or truncated, info


class CountingSampler:
    """Says a random admissible action, and counts the tokens that a model would have read; one episode at a time."""

    wants_turns = waits_for_turns = True
    max_episodes = 1

    def __init__(self, tokenizer, seed: int):
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        self.asked: list[int] = []
        self.held = 0  # tokens of the present context
        self.read = self.read_without_cache = 0

    @property
    def is_busy(self) -> bool:
        return bool(self.asked)

    def add(self, episode, new_ids, max_new_tokens):
        self.held += len(new_ids)
        self.read += len(new_ids)
        self.read_without_cache += self.held
        self.asked.append(episode)

    def rewind(self, episode, num_tokens):
        self.held = num_tokens

    def drop(self, episode):
        self.held = 0

    def advance(self):
        action = self.random.choice(Endless.admissible)
        text = f"<think>The task is not done yet. I could {action}, and see what it does.</think><action>{action}</action>"
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        self.held += len(ids)
        self.read += len(ids)
        self.read_without_cache += len(ids)
        return [(self.asked.pop(), Sample(ids, None))]


def count(tokenizer, turns: int, window: bool, script: ContextArguments) -> dict:
    chat = ChatEncoder(tokenizer, [tokenizer.eos_token_id])
    rules = ContextRules(chat, max_length=10**9, window=window, context_turns=script.context_turns)
    sampler = CountingSampler(tokenizer, script.seed)
    episodes, seed = [], script.seed
    read, read_without_cache = [], []
    while len(episodes) < script.episodes:
        before = sampler.read, sampler.read_without_cache
        pool = EnvironmentPool(lambda: Endless(rooms=4, turns=turns))
        starts = [EpisodeStart([], seed, {})]
        [episode] = play_episodes(starts, pool, rules, sampler, Limits(max_turns=turns, max_turn_length=10**9))
        pool.close()
        if episode.failed:
            raise ValueError(f"An episode of {turns} turns could not be played:\n{episode.failures[-1].traceback}")
        seed += 1
        if len(episode.turns) == turns:  # not those that do the chore by chance
            episodes.append(episode)
            read.append(sampler.read - before[0])
            read_without_cache.append(sampler.read_without_cache - before[1])
    return {
        "turns": turns,
        "context": "window" if window else "transcript",
        "episodes": len(episodes),
        "read": fmean(read),
        "read_without_cache": fmean(read_without_cache),
        "trained": fmean(sum(episode.context_lengths) for episode in episodes),
        "longest": max(max(episode.context_lengths) for episode in episodes),
        "contexts": fmean(len(episode.context_lengths) for episode in episodes),
    }


def main() -> None:
    (script,) = TrlParser((ContextArguments,)).parse_args_and_config()
    _, tokenizer = load(script.model)
    rows = []
    for turns in script.turns:
        for window in (False, True):
            rows.append(count(tokenizer, turns, window, script))
            save_json(script.json, rows, asdict(script))
    show(rows, "Tokens of an episode")


if __name__ == "__main__":
    main()
