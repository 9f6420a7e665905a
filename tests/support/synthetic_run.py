"""
A run's folder as a training leaves it, without training: the real household game, played by a policy that gets better.

Its answers, tokens, log-probs and entropies are drawn, by a seed.
"""

import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trl_epo.envs.household import Household
from trl_epo.reports.episode_schema import SCHEMA, VERSION


PANELS = {"iid": "iid", "ood": "ood"}  # name of an evaluation set -> split of the game
SYSTEM = "You are playing a text game. Think, then answer with one command: <think>…</think> <action>…</action>"
KAPPA_LOW, KAPPA_HIGH = 0.4, 1.6
THOUGHTS = (
    "I have to {task} so I look around first.",
    "The {word} may be behind one of these doors.",
    "Nothing of use here, the next room may have it.",
    "I carry what I need, now to the {word}.",
    "It was refused before, so I try something else.",
    "The {word} is closed, it could hold what I look for.",
)
GIBBERISH = ("go kitchen", "take the thing", "look under bed", "open door", "put it down")
PIECES = re.compile(r"<[^>]*>| ?\w+|\s+|[^\w\s]")


class Policy:
    """Plays the expert's command with a chance that grows over the run; its entropy falls or, `collapsing`, dies out."""

    def __init__(self, seed: int, collapsing: bool, steps: int):
        self.random = random.Random(seed)
        self.collapsing = collapsing
        self.steps = steps

    def skill(self, step: int) -> float:
        progress = step / self.steps
        best = 0.3 if self.collapsing else 0.72
        return 0.08 + best / (1 + math.exp(-9 * (progress - 0.35)))

    def entropy(self, step: int, turn: int = 0) -> float:
        progress = step / self.steps
        if self.collapsing:  # early turns first, while late ones grow
            return max(0.9 * math.exp(-3.2 * progress) + 0.02 * turn * progress, 0.02)
        return 0.9 - 0.35 * progress + 0.05 * math.sin(9 * progress)

    def answer(self, env: Household, info: dict[str, Any], step: int, task: str) -> tuple[str, bool]:
        """The text of a turn, and whether it was cut."""
        draw = self.random.random()
        if draw < self.skill(step) * 0.95 + 0.3 * (draw < 0.02):
            command = env.expert_action()
        elif self.random.random() < 0.22 * (1 - step / self.steps) + 0.03:
            command = self.random.choice(GIBBERISH)
        else:
            command = self.random.choice(info["admissible_actions"])
        thought = self.random.choice(THOUGHTS).format(task=task.rstrip("."), word=command.split()[-1])
        draw = self.random.random()
        if draw < 0.02:
            return f"<think>{thought} {thought} {thought}", True
        if draw < 0.04:
            return f"<think>{thought}</think> {command}", False
        return f"<think>{thought}</think> <action>{command}</action>", False

    def tokens(self, text: str, cut: bool, step: int, turn: int) -> dict[str, list]:
        tokens = PIECES.findall(text) + ([] if cut else ["<|im_end|>"])
        level, in_action, logprobs, entropies = self.entropy(step, turn), False, [], []
        for token in tokens:
            sure = 0.08 if token.startswith("<") or not token.strip() else 1.6 if in_action else 1.0
            entropy = min(level * sure * self.random.expovariate(1.0), 6.0)
            entropies.append(entropy)
            logprobs.append(-entropy * self.random.expovariate(1.0))
            in_action = token == "<action>"
        ids = [hash_of(token) for token in tokens]
        return {"token_ids": ids, "tokens": tokens, "logprobs": logprobs, "entropies": entropies}

    def reference(self, step: int) -> float | None:
        past = [self.entropy(before) for before in range(0, step, 2)]
        return 0.77 * sum(past) / len(past) if past else None  # not all tokens are as uncertain as `entropy` says


def hash_of(token: str) -> int:
    return sum(ord(character) * 31**place for place, character in enumerate(token)) % 32000


def play(policy: Policy, seed: int, step: int, options: dict[str, Any], env: Household) -> dict[str, Any]:
    """One episode, as columns of the schema; those of its place in the run are the caller's."""
    observation, info = env.reset(seed=seed, options=options)
    first, task = observation, observation.split(". ")[0].removeprefix("Your task: ")
    turns, terminated, truncated = [], False, False
    prompt = (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{observation}<|im_end|>\n<|im_start|>assistant\n"
    )
    while not (terminated or truncated):
        text, cut = policy.answer(env, info, step, task)
        found = re.search(r"<action>(.*?)</action>", text)
        action = found[1] if found else None
        answer, reward, terminated, truncated, info = env.step(action or "")
        invalid = action is None or info["invalid_action"]
        turns.append(
            {
                "prompt": prompt,
                "starts_context": not turns,
                "text": text,
                "action": action,
                "valid": not invalid,
                "cut": cut,
                "observation": answer,
                "reward": reward,
                "advantage": None,
                **policy.tokens(text, cut, step, len(turns)),
            }
        )
        prompt = f"<|im_end|>\n<|im_start|>user\n{answer}<|im_end|>\n<|im_start|>assistant\n"
    reference = policy.reference(step)
    return {
        "version": VERSION,
        "step": step,
        "rl_step": step,
        "task": info["task"],
        "seed": seed,
        "options": json.dumps(options),
        "success": info["success"],
        "return": sum(turn["reward"] for turn in turns),
        "stop_reason": "terminated" if terminated else "truncated",
        "num_turns": len(turns),
        "num_invalid": sum(not turn["valid"] for turn in turns),
        "first_observation": first,
        "turns": turns,
        "failures": [],
        "entropy_reference": reference,
        "corridor_low": reference and KAPPA_LOW * reference,
        "corridor_high": reference and KAPPA_HIGH * reference,
    }


def train_batch(policy: Policy, step: int, groups: int, group_size: int, env: Household) -> list[dict[str, Any]]:
    rows = []
    for group in range(groups):
        options = {"split": "train", "rooms": 3, "turns": 12}
        episodes = [play(policy, 1000 * step + group, step, options, env) for _ in range(group_size)]
        mean = sum(episode["return"] for episode in episodes) / group_size
        spread = math.sqrt(sum((episode["return"] - mean) ** 2 for episode in episodes) / group_size)
        for episode in episodes:
            for turn in episode["turns"]:
                turn["advantage"] = (episode["return"] - mean) / (spread + 1e-4)
            place = {"mode": "train", "panel": None, "row": len(rows), "group": group, "temperature": 1.0}
            rows.append(episode | place | {"environment": None})
    if step and step % 40 == 0:  # now and then a process of the environment dies
        failure = {"kind": "process_died", "turn": 2, "cause": "the environment's process ended with exit code -9"}
        rows[-1] |= {
            "failures": [failure] * 2,
            "stop_reason": "failure",
            "success": None,
            "turns": rows[-1]["turns"][:2],
        }
        rows[-1] |= {"num_turns": 2, "return": 0.0}
    return rows


def panel_rows(policy: Policy, panel: str, step: int, size: int, env: Household) -> list[dict[str, Any]]:
    rows = []
    for row in range(size):
        options = {"split": PANELS[panel], "rooms": 3, "turns": 12}
        episode = play(policy, 77_000 + row, step, options, env)
        place = {"mode": "eval", "panel": panel, "row": row, "group": row, "temperature": 0.4, "environment": None}
        rows.append(episode | place)
    return rows


def wilson(rate: float, count: int) -> tuple[float, float]:
    z = 1.96
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half


def episode_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    rows = [row for row in rows if row["stop_reason"] != "failure"]
    turns = sum(row["num_turns"] for row in rows)
    return {
        "episode/success_rate": sum(row["success"] for row in rows) / len(rows),
        "episode/return": sum(row["return"] for row in rows) / len(rows),
        "episode/turns": turns / len(rows),
        "episode/invalid_actions": sum(row["num_invalid"] for row in rows) / turns,
    }


def entropy_metrics(policy: Policy, rows: list[dict[str, Any]], step: int) -> dict[str, float]:
    def of_turns(turns: Iterator[dict[str, Any]]) -> list[float]:
        return [entropy for turn in turns for entropy in turn["entropies"]]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    early = of_turns(t for row in rows for t in row["turns"][: (len(row["turns"]) + 1) // 2])
    late = of_turns(t for row in rows for t in row["turns"][(len(row["turns"]) + 1) // 2 :])
    tokens = early + late
    metrics = {
        "epo/entropy": mean(tokens),
        "epo/entropy_early_turns": mean(early),
        "epo/entropy_late_turns": mean(late),
        "epo/entropy_bonus": mean(tokens),
    }
    if (reference := policy.reference(step)) is not None:
        low, high = KAPPA_LOW * reference, KAPPA_HIGH * reference
        metrics |= {"epo/entropy_reference": reference, "epo/corridor_low": low, "epo/corridor_high": high}
        metrics["epo/below_corridor"] = sum(entropy < low for entropy in tokens) / len(tokens)
        metrics["epo/above_corridor"] = sum(entropy > high for entropy in tokens) / len(tokens)
        metrics["epo/smoothing_loss"] = mean([max(low - e, 0.0) + max(e - high, 0.0) for e in tokens])
        metrics["epo/phase_weight"] = 1.0 - 0.5 * math.exp(-step / 40)
    return metrics


def write_rows(rows: list[dict[str, Any]], path: Path, schema: pa.Schema = SCHEMA) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")


def write_log(log_history: list[dict[str, Any]], run: Path) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "trainer_state.json").write_text(json.dumps({"global_step": 0, "log_history": log_history}))


def write_run(
    run: Path,
    *,
    seed: int = 0,
    collapsing: bool = False,
    steps: int = 200,
    every: int = 10,
    groups: int = 2,
    group_size: int = 4,
    eval_every: int = 40,
    panel_size: int = 10,
) -> int:
    """Writes the folder of a run; returns how many episodes it has."""
    policy, env, history, count = Policy(seed, collapsing, steps), Household(rooms=3, turns=12), [], 0
    for step in range(0, steps + 1, every):
        rows = train_batch(policy, step, groups, group_size, env)
        write_rows(rows, run / "episodes" / "train" / f"step-{step:06d}.parquet")
        history.append({"step": step, "epoch": 0.0} | episode_metrics(rows) | entropy_metrics(policy, rows, step))
        count += len(rows)
        for panel in PANELS if step % eval_every == 0 else ():
            rows = panel_rows(policy, panel, step, panel_size, env)
            write_rows(rows, run / "episodes" / "eval" / panel / f"step-{step:06d}.parquet")
            metrics = episode_metrics(rows)
            low, high = wilson(metrics["episode/success_rate"], panel_size)
            metrics |= {"episode/success_low": low, "episode/success_high": high}
            history.append({"step": step} | {f"eval_{panel}_{name}": value for name, value in metrics.items()})
            count += len(rows)
    write_log(history, run)
    return count
