"""Says in plain words, once a run and kind, what keeps a run from learning."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config import EPOConfig
from ..rollouts import Episode, EpisodeSummary, PlayedBatch, StopReason
from ..text import MAX_FAILURE_LENGTH, set_apart, shortened


NEARLY_ALL, MOST = 0.9, 0.5
STEPS_IN_A_ROW = 3  # of what one batch may show by chance
FLAT_GROUPS = (
    20  # a policy that succeeds in 2 % of its episodes, in groups of 8, has as many in a row once in 25 times
)
FIRST_STEPS = 3  # whose entropy later ones are compared with
COLLAPSED = 0.05  # of the first steps' entropy
NO_ENTROPY = 1e-3  # nats
NOISE = 0.9  # of ln V, the entropy of tokens drawn blindly
RISEN = 0.25  # of the way from the first steps' entropy to ln V …
TIMES_RISEN = 2.0  # … if it is also that many times the former
WHERE_TO_LOOK = Path(__file__).parents[1] / "docs" / "troubleshooting.md"  # which comes with the package


class Diagnosis:
    """
    Looks at each generation batch and says what is wrong.

    What one batch tells for certain is said at once (actions, token limits, failures); what may be chance is said when it
    has lasted for some RL steps (groups without variance, entropy). A cause comes before what follows from it: of a batch
    whose thoughts are all cut nothing is said of its invalid actions.

    Args:
        args ([`EPOConfig`]): The settings.
        num_tokens (`int`): V, the size of the vocabulary.
        decode (`Callable`): Token ids to text, special tokens included.
    """

    def __init__(self, args: EPOConfig, num_tokens: int, decode: Callable[[Sequence[int]], str]):
        self._args = args
        self._most_entropy = math.log(num_tokens)
        self._decode = decode
        self._told: set[str] = set()
        self._flat_steps, self._flat_groups = 0, 0  # in a row

    def observe(self, batch: PlayedBatch, rewards: Sequence[float], entropies: Sequence[float]) -> list[str]:
        """
        Take note of an RL step.

        Args:
            batch ([`PlayedBatch`]): Its episodes; the summaries are those of all processes, and so are the findings.
            rewards (`Sequence[float]`): Of each episode, over all processes, groups next to each other; NaN for failed ones.
            entropies (`Sequence[float]`): Mean entropy of action tokens of each earlier RL step, in nats.

        Returns:
            `list[str]`: What has not been said before: a paragraph each.
        """
        played = [summary for summary in batch.summaries if summary.stop_reason is not StopReason.FAILURE]
        flat = self._count_flat_groups(rewards)
        solved = _solved(played)
        found = self._in_this_batch(batch.summaries, played)
        if flat and not (found or solved):
            found["flat"] = self._of_flat_groups(played)
        if not solved:
            found |= self._in_entropies(entropies)
        new = {kind: text for kind, text in found.items() if kind not in self._told}
        self._told |= new.keys()
        return [f"{text} More: {WHERE_TO_LOOK}.{self._example(batch.episodes, kind)}" for kind, text in new.items()]

    def _in_this_batch(self, summaries: Sequence[EpisodeSummary], played: Sequence[EpisodeSummary]) -> dict[str, str]:
        """What is wrong by its kind, causes before what follows from them."""
        args = self._args
        num_failed = len(summaries) - len(played)
        if summaries and num_failed >= NEARLY_ALL * len(summaries):
            return {
                "failures": f"{num_failed} of {len(summaries)} episodes failed: their environments raised, hung or died, so "
                "that there is nothing to learn from. The first errors are above in the log, all of them in "
                "episodes/failures.jsonl. `trl_epo.check_env` tries an environment by itself."
            }
        found = {}
        num_turns = max(sum(summary.num_turns for summary in played), 1)
        num_cut = sum(summary.num_cut_turns for summary in played)
        num_thoughts = sum(summary.num_cut_thoughts for summary in played)
        num_invalid = sum(summary.num_invalid_actions for summary in played)
        if num_thoughts > MOST * num_turns:
            found["thoughts"] = (
                f"{_share(num_thoughts, num_turns)} of the turns ended within a thought (`<think>`). Such a turn has no "
                f"action, so the environment gets nothing. Raise `max_turn_length` ({args.max_turn_length} tokens) until the "
                "model comes to its `</think>`, or switch thoughts off where the chat template can: "
                '`EPOConfig(chat_template_kwargs={"enable_thinking": False})`.'
            )
        elif num_cut > MOST * num_turns:
            found["cut"] = (
                f"{_share(num_cut, num_turns)} of the turns were cut by the limit on tokens, and what was written by then was "
                "taken for the action. The model talks instead of acting, or does not end its turn. Tell it the form of an "
                f"answer in the environment's `instructions`, raise `max_turn_length` ({args.max_turn_length} tokens) if its "
                "answers are right but longer, and see that the model's end-of-turn token is its `eos_token`."
            )
        if num_invalid >= NEARLY_ALL * num_turns and "thoughts" not in found:
            found["invalid"] = (
                f"{_share(num_invalid, num_turns)} of the actions were invalid: the action parser found none, or the "
                "environment did not understand it. The model does not know the commands or the form of an answer, and "
                "learns neither without a success. Say both, with an example, in the environment's `instructions` or in a "
                "`prompt` column; give an `action_parser` that finds the action in what it writes; or let it imitate some "
                "good episodes first."
            )
        num_short = sum(summary.stop_reason is StopReason.TOKEN_BUDGET for summary in played)
        if num_short > MOST * max(len(played), 1):
            turns = num_turns / len(played)
            found["budget"] = (
                f"{_share(num_short, len(played))} of the episodes ended since their tokens were used up (`token_budget`), "
                f"after {turns:.1f} turns on average, but `max_turns` is {args.max_turns}. An episode that stops before its "
                "end seldom succeeds. Raise `max_completion_length` (the whole episode's, observations included; leave it "
                "out for the rest of the model's context), lower `max_turn_length` or `max_observation_length`, or set "
                "`context_overflow='window'`."
            )
        return found

    def _count_flat_groups(self, rewards: Sequence[float]) -> bool:
        """Whether no group has had any variance for some steps in a row."""
        size = len(rewards) if self._args.advantage_estimator == "gae" else self._args.num_generations
        groups = [rewards[first : first + size] for first in range(0, len(rewards), size)]
        if all(len({reward for reward in group if not math.isnan(reward)}) < 2 for group in groups):
            self._flat_steps += 1
            self._flat_groups += len(rewards) // self._args.num_generations
        else:
            self._flat_steps, self._flat_groups = 0, 0
        return self._flat_steps >= STEPS_IN_A_ROW and self._flat_groups >= FLAT_GROUPS

    def _of_flat_groups(self, played: Sequence[EpisodeSummary]) -> str:
        judged = [summary.success for summary in played if summary.success is not None]
        success = f" {sum(judged)} of {len(judged)} episodes of the last batch succeeded." if judged else ""
        return (
            f"For {self._flat_steps} RL steps ({self._flat_groups} groups) all episodes of a group had the same reward."
            f"{success} Advantages compare the episodes of a group, so they were all 0 and the policy has not learned from "
            "its rewards. Begin with easier tasks or a reward for parts of the way, raise `num_generations` or `temperature`, "
            "or let the model imitate some good episodes first."
        )

    def _in_entropies(self, entropies: Sequence[float]) -> dict[str, str]:
        if len(entropies) < STEPS_IN_A_ROW:
            return {}
        first, last = entropies[:FIRST_STEPS], entropies[-STEPS_IN_A_ROW:]
        begin, most = sum(first) / len(first), self._most_entropy
        seen = (
            f"The policy's entropy is {last[-1]:.3g} nats a token; in the first steps it was {begin:.3g}, and {most:.3g} are "
            "those of tokens drawn blindly."
        )
        if max(last) < max(NO_ENTROPY, COLLAPSED * begin):
            return {
                "collapse": f"{seen} It writes nearly the same each time, so the episodes of a group hardly differ and nothing "
                "new is tried. Lower `learning_rate`, raise `temperature`, raise `entropy_coef`, or set a floor with "
                "`entropy_corridor_coef` and `entropy_corridor_low`."
            }
        if min(last) > NOISE * most:
            return {
                "noise": f"{seen} It writes noise: the model was not trained, or training has broken it. Begin with an "
                "instruct model or a warm-up; if it began well, lower `learning_rate` and `entropy_coef`."
            }
        if min(last) > max(TIMES_RISEN * begin, begin + RISEN * (most - begin)):
            return {
                "explosion": f"{seen} It loses what it knew and goes on towards noise. Lower `entropy_coef` and "
                "`learning_rate`, or set a cap with `entropy_corridor_coef` and `entropy_corridor_high`; go on from a "
                "checkpoint before the rise."
            }
        return {}

    def _example(self, episodes: Sequence[Episode], kind: str) -> str:
        """The first turn of an episode of this process, one that shows what is wrong if there is one."""
        turns = [(episode, episode.turns[0]) for episode in episodes if episode.turns and not episode.failed]
        if not turns:
            return ""
        shows = {"thoughts": "cut_thought", "cut": "cut", "invalid": "invalid"}.get(kind)
        episode, turn = next((pair for pair in turns if shows and getattr(pair[1], shows)), turns[0])
        action = "no action" if turn.action is None else "the action below"
        return (
            f" An episode began like this.\nThe model read:\n{_block(self._decode(episode.prompt_ids))}"
            f"\nIt wrote:\n{_block(self._decode(turn.action_ids))}"
            f"\nThe parser found {action}:\n{_block(turn.action or '')}\nThe environment answered:\n{_block(turn.observation)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON can carry it."""
        return {"told": sorted(self._told), "flat_steps": self._flat_steps, "flat_groups": self._flat_groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what [`state_dict`] gave; nothing of it is a new run's."""
        self._told = set(state.get("told", ()))
        self._flat_steps, self._flat_groups = state.get("flat_steps", 0), state.get("flat_groups", 0)


def _solved(played: Sequence[EpisodeSummary]) -> bool:
    """Whether nearly all episodes succeed, so that equal rewards and little entropy are as they should be."""
    judged = [summary.success for summary in played if summary.success is not None]
    return bool(judged) and sum(judged) >= NEARLY_ALL * len(judged)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%} ({part} of {whole})"


def _block(text: str) -> str:
    return set_apart(shortened(text, MAX_FAILURE_LENGTH)) or "  | "
