"""Generation batches and panels of text episodes, over all processes. Knows no trainer."""

import logging
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.trainer_utils import has_length

from ..config import EPOConfig
from ..sampling import TurnSampler
from .chat import ChatEncoder
from .contexts import ContextRules, PromptBuilder, build_prompt, describe_turn
from .dataset_rows import FirstRow, environment_options
from .environment_pool import EnvironmentPool
from .episode import Episode, EpisodeSummary, StopReason, episode_row
from .failure_log import FailureLog
from .rollout import ActionParser, EpisodeStart, Limits, parse_action, parse_tagged_action, play_episodes


logger = logging.getLogger(__name__)

EPISODES_FOLDER = Path("episodes")  # in the run's folder
FAILURES_FILE = EPISODES_FOLDER / "failures.jsonl"
MAX_RESAMPLES = 3  # of a group whose returns are all equal
# In the place of a row that accelerate repeats, to fill up the last batch of an evaluation.
UNPLAYED = Episode([{"role": "user", "content": ""}], (), (), StopReason.FAILURE)

# Of this process's episodes: which of them to play again, and in how many groups these are, over all processes.
FlatEpisodes = Callable[[list[Episode]], tuple[list[int], int]]


class TooManyFailures(RuntimeError):
    """More episodes of a generation batch failed than `max_failed_fraction` allows."""


@dataclass(frozen=True)
class PlayedBatch:
    """
    This process's episodes of a generation batch, and the rows of tokens that they make; lists by episode.

    Args:
        episodes (`list[Episode]`): As they were played.
        prompt_ids (`list[list[int]]`): Tokens of the first prompt.
        completion_ids (`list[list[int]]`): Tokens after it: actions, and observations between them.
        logprobs (`list[list[float]]` or `None`): Sampling log-probabilities of these, in nats; `None` if they are not known.
        action_mask (`list[list[int]]`): 1 at action tokens.
        turn_ids (`list[list[int]]`): The turn of each action token; −1 at observation tokens.
        context_ids (`list[list[int]]` or `None`): The context of each token; `None` if all are in one.
        num_resampled (`int`): Groups that were played again, over all processes.
        places (`list[int]`): The place in the generation batch, or in the panel, of each episode, counted over all processes;
            those that only fill up a batch come last and have none.
        groups (`list[int]`): The group of the generation batch, or the row of the panel, of each of these.
        summaries (`list[EpisodeSummary]`): Of the episodes of all processes, by process.
    """

    episodes: list[Episode]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float]] | None
    action_mask: list[list[int]]
    turn_ids: list[list[int]]
    context_ids: list[list[int]] | None
    num_resampled: int = 0
    places: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    summaries: list[EpisodeSummary] = field(default_factory=list)


class EpisodePlayer:
    """
    Plays the episodes of dataset rows: which group each belongs to, its seed, which are played again, what is noted of them.

    A mode is `"train"` or `"eval"`.

    Args:
        args ([`EPOConfig`]): The settings.
        accelerator ([`~accelerate.Accelerator`]): Tells this process's place, and gathers over all.
        environments ([`EnvironmentPool`]): The environments.
        chat ([`ChatEncoder`]): Turns messages into tokens.
        max_length (`int`): Longest context after its first prompt, in tokens, observations included.
        context_length (`int` or `None`): Longest context, in tokens; `None` if no bound is known.
        num_generations_eval (`int`): Episodes of each row of a panel.
        action_parser (`Callable[[str], str | None]`, *optional*): Finds the action in the model's text.
        prompt_builder (`Callable`, *optional*): Makes the prompt of a turn where a window is asked for.

    Attributes:
        environments ([`EnvironmentPool`]): The environments.
        action_parser (`Callable[[str], str | None]`): Finds the action in the model's text.
        rules ([`ContextRules`]): What the model sees.
        limits ([`Limits`]): What bounds episodes.
        longest_context (`int`): An estimate of the longest context, in tokens, made of the dataset's first row.
        num_fitting (`float` or `None`): How many episodes fit into the devices' memory at once, on any process; `None` until
            that is known.
        failures ([`FailureLog`]): Failures of episodes, over all processes.
        summaries (`dict[str, list[EpisodeSummary]]`): By mode: episodes that have not been logged, of all processes.
    """

    def __init__(
        self,
        args: EPOConfig,
        accelerator: Accelerator,
        environments: EnvironmentPool,
        chat: ChatEncoder,
        max_length: int,
        context_length: int | None,
        num_generations_eval: int,
        action_parser: ActionParser | None = None,
        prompt_builder: PromptBuilder | None = None,
    ):
        self._args = args
        self._accelerator = accelerator
        self.environments = environments
        self._num_generations_eval = num_generations_eval
        windows = args.context == "window"
        asks_for_tags = windows and prompt_builder is None
        self.action_parser = action_parser or (parse_tagged_action if asks_for_tags else parse_action)
        self.rules = ContextRules(
            chat,
            max_length=max_length,
            context_length=context_length,
            max_turn_length=args.max_turn_length,
            window=windows,
            overflow_to_window=args.context_overflow == "window",
            context_turns=args.context_turns,
            prompt_builder=prompt_builder or (build_prompt if windows else describe_turn),
        )
        self._batch_size = args.per_device_train_batch_size * args.steps_per_generation  # of a process, in episodes
        self.limits = Limits(
            max_turns=args.max_turns,
            max_turn_length=args.max_turn_length,
            max_concurrent_episodes=min(args.max_concurrent_episodes or math.inf, self._batch_size),
            patience=args.environment_patience,
            max_retries=args.env_max_retries,
            max_observation_length=args.max_observation_length,
        )
        texts = environments.instructions()
        self._instructions = {name: chat.instruct(text) if text else [] for name, text in texts.items()}
        self.longest_context: float = context_length or max_length
        self._forget_memory()
        self._num_panel_rows = 0  # that were given out so far
        self._panel_size = 0  # in episodes
        self.failures = FailureLog(Path(args.output_dir, FAILURES_FILE), accelerator.is_main_process)
        self.summaries: dict[str, list[EpisodeSummary]] = {"train": [], "eval": []}

    def check_prompts(self, first_row: FirstRow) -> None:
        """
        Try the prompt builder, if there is one, on the dataset's first row. Raises a `ValueError` if it does not do. The row
        also tells how long a prompt is.
        """
        self.rules.check_builder(*first_row)
        if first_row.prompt and any(self._instructions.values()):
            logger.warning(
                "The dataset's `prompt` takes the place of the environment's `instructions`. Where the model should read "
                "these, remove that column."
            )
        prompts = [first_row.prompt] if first_row.prompt else self._instructions.values()
        self.longest_context = max(self.rules.longest_context(prompt, *first_row[1:]) for prompt in prompts)

    def begin_training(self) -> None:
        """Forget what an earlier training has left."""
        self._forget_memory()
        self._begin("train")

    def _forget_memory(self) -> None:
        chosen = self._args.max_concurrent_episodes is not None
        self.num_fitting: float | None = math.inf if chosen else None

    def begin_panel(self, rows) -> None:
        """Begin an evaluation set; what an evaluation that was interrupted has left is forgotten."""
        self._num_panel_rows = 0
        self._panel_size = len(rows) * self._num_generations_eval if has_length(rows) else sys.maxsize
        self._begin("eval")

    @property
    def panel_batch_size(self) -> int:
        """
        How many episodes of a panel a process is to be given for a batch: `per_device_eval_batch_size`, but as many as it
        plays at once in training, in whole groups over all processes.
        """
        whole = self._num_generations_eval // math.gcd(self._num_generations_eval, self._accelerator.num_processes)
        return max(max(self._args.eval_batch_size, self._batch_size) // whole, 1) * whole

    def _begin(self, mode: str) -> None:
        self.summaries[mode].clear()
        self.failures.begin(mode)

    def play(
        self,
        rows: list[dict[str, Any]],
        mode: str,
        sampler: TurnSampler,
        step: int,
        rl_step: int,
        flat_episodes: FlatEpisodes,
    ) -> PlayedBatch:
        """
        Play an episode from each of this process's dataset rows; called by every process at once.

        Args:
            rows (`list[dict]`): Dataset rows, the copies of a group's next to each other.
            mode (`str`): `"train"` or `"eval"`.
            sampler ([`TurnSampler`]): Samples from the policy.
            step (`int`): Optimizer steps made.
            rl_step (`int`): Index of the RL step, from 0.
            flat_episodes (`Callable`): Tells which episodes teach nothing, since their group's rewards are all equal.

        Raises:
            TooManyFailures: If more than `max_failed_fraction` of a training batch failed, on all processes.
        """
        if self.num_fitting is None:
            self.num_fitting = min(gather_object([sampler.num_fitting()]))
            if self.num_fitting < self._batch_size and self._accelerator.is_main_process:
                logger.warning(
                    "%d of the batch's %d episodes fit into the memory at once if each takes %d tokens. If they take less, say so: "
                    "`max_completion_length`, observations included. Or set `max_concurrent_episodes`.",
                    self.num_fitting,
                    self._batch_size,
                    self.longest_context,
                )
        at_once = min(self.num_fitting, self.limits.max_concurrent_episodes)
        sampler.hold_at_most(at_once)
        places = self._places(mode, len(rows))
        num_generations = self._args.num_generations if mode == "train" else self._num_generations_eval
        groups = [place // num_generations for place in places]
        resamples = MAX_RESAMPLES * (mode == "train" and self._args.filter_zero_variance_groups == "resample")
        starts = [
            [self.start(row, mode, rl_step, group, attempt) for row, group in zip(rows, groups, strict=False)]
            for attempt in range(1 + resamples)
        ]
        episodes, num_resampled = self._play(starts[0], sampler), 0
        for others in starts[1:]:
            flat, num_groups = flat_episodes(episodes)
            num_resampled += num_groups
            for i, episode in zip(flat, self._play([others[i] for i in flat], sampler), strict=True):
                episodes[i] = episode
        if (fitted := min(gather_object([sampler.max_episodes]))) < at_once:
            self.num_fitting = fitted
        summaries = [EpisodeSummary.of(episode, group) for episode, group in zip(episodes, groups, strict=True)]
        summaries = gather_object(summaries)
        failures = self.failures.share(mode, step=step, rl_step=rl_step)
        if mode == "train":
            self._check_failed_fraction(summaries, failures)
        self.summaries[mode] += summaries
        batch = self._batch(episodes + [UNPLAYED] * (len(rows) - len(groups)), num_resampled)
        return replace(batch, places=places, groups=groups, summaries=summaries)

    def _play(self, starts: list[EpisodeStart], sampler: TurnSampler) -> list[Episode]:
        episodes = play_episodes(
            starts=starts,
            pool=self.environments,
            rules=self.rules,
            sampler=sampler,
            limits=self.limits,
            action_parser=self.action_parser,
        )
        self.failures.note(episodes)
        return episodes

    def _check_failed_fraction(self, summaries: list[EpisodeSummary], failures: list[dict[str, Any]]) -> None:
        num_failed = sum(summary.stop_reason is StopReason.FAILURE for summary in summaries)
        if num_failed <= self._args.max_failed_fraction * len(summaries):
            return
        first = failures[0]
        raise TooManyFailures(
            f"{num_failed} of {len(summaries)} episodes failed, more than `max_failed_fraction="
            f"{self._args.max_failed_fraction}` allows. The first: {first['kind']} after {first['num_turns']} turns: "
            f"{first['cause']}\nAll of them, with tracebacks: {self.failures.path}."
        )

    def _places(self, mode: str, num_rows: int) -> list[int]:
        """
        The places in the generation batch, or in the panel, of the episodes of this process's dataset rows. Those with which
        accelerate fills up the last batch of an evaluation come last and get none.
        """
        first = self._accelerator.process_index * num_rows
        if mode == "train":
            return list(range(first, first + num_rows))
        first += self._num_panel_rows
        self._num_panel_rows += num_rows * self._accelerator.num_processes
        last = min(first + num_rows, self._panel_size)
        return list(range(first, last))

    def start(self, row: dict[str, Any], mode: str, rl_step: int, group: int, attempt: int) -> EpisodeStart:
        """Where the episode of a dataset row begins; the copies of a row, on whatever process, share one seed."""
        seed = row.get("seed")
        if seed is None:
            # Training: a new seed each RL step. Evaluation: the same panel each time.
            train = mode == "train"
            seed = derived_seed(self._args.seed, train, rl_step if train else 0, group, attempt)
        name = row.get("environment") if self.environments.named else None
        prompt = row.get("prompt")
        if prompt is None:
            prompt = self._instructions.get(name, [])
        return EpisodeStart(prompt, seed, environment_options(row), name)

    def _batch(self, episodes: list[Episode], num_resampled: int) -> PlayedBatch:
        pad_token_id = self.rules.chat.tokenizer.pad_token_id  # stands for the tokens of a failed episode
        rows = [episode_row(episode, pad_token_id) for episode in episodes]
        if self._args.mask_truncated_completions:
            rows = [row.masked() if episode.cut_off else row for row, episode in zip(rows, episodes, strict=True)]
        logprobs = [row.logprobs for row in rows]
        windowed = self._args.context == "window" or self._args.context_overflow == "window"
        return PlayedBatch(
            episodes=episodes,
            # A failed episode keeps its place in the batch, but not its prompt, which may be what failed.
            prompt_ids=[[pad_token_id] if episode.failed else list(episode.prompt_ids) for episode in episodes],
            completion_ids=[row.completion_ids for row in rows],
            logprobs=None if None in logprobs else logprobs,
            action_mask=[row.action_mask for row in rows],
            turn_ids=[row.turn_ids for row in rows],
            context_ids=[row.context_ids for row in rows] if windowed else None,
            num_resampled=num_resampled,
        )

    # Figures of a run between two log entries, as JSON can carry them

    def state_dict(self) -> dict[str, Any]:
        return {
            "episodes": [summary.as_json() for summary in self.summaries["train"]],
            "failures": self.failures.counts["train"],
            "num_fitting": None if self.num_fitting == math.inf else self.num_fitting,
            "max_concurrent_episodes": self._args.max_concurrent_episodes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.summaries["train"] = [EpisodeSummary.from_json(row) for row in state["episodes"]]
        self.failures.counts["train"] = Counter(state["failures"])
        asked_for = state.get("max_concurrent_episodes")
        if state.get("num_fitting") is not None and asked_for == self._args.max_concurrent_episodes:
            self.num_fitting = state["num_fitting"]


def derived_seed(seed: int, train: bool, step: int, group: int, attempt: int = 0) -> int:
    """A seed of 32 bits for a group's episodes, well mixed and the same on every machine."""
    parts = [seed, train, step, group, attempt] if attempt else [seed, train, step, group]
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
