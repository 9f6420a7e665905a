"""
A page to look at one or two training runs: curves, and kept episodes turn by turn, in one HTML file.

The page makes no request and works from the disk. Everything that comes from a run is in it as base64 of compressed JSON
and is only ever shown as text; a content security policy lets no script run but the page's own.
"""

import base64
import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


PAGE = Path(__file__).parent / "viewer_page"
# Bytes. What is left to the 50 MB of a page is for the list of episodes, the curves and the page itself.
TEXTS_SIZE = 30_000_000
EPISODES_SIZE = 45_000_000  # texts and tokens
CHUNK = 16  # episodes that are unpacked together when one of them is opened
TRIAL = 512  # episodes that tell how large one is

PLACE = ("run", "mode", "panel", "step", "rl_step", "row", "group", "environment", "task", "seed", "temperature")
OUTCOME = ("success", "return", "stop_reason", "num_turns", "num_invalid", "entropy")
CORRIDOR = ("entropy_reference", "corridor_low", "corridor_high")
WORDS = ("prompt", "starts_context", "text", "action", "valid", "cut", "observation", "reward", "advantage")
SAMPLED = ("tokens", "logprobs", "entropies")

EPISODE_METRICS = ("success_rate", "return", "turns", "invalid_actions", "success_low", "success_high")
EPO_METRICS = (
    *("entropy", "entropy_reference", "corridor_low", "corridor_high", "entropy_early_turns", "entropy_late_turns"),
    *("below_corridor", "above_corridor", "entropy_bonus", "smoothing_loss", "phase_weight", "corridor_slope"),
)
PANEL_METRIC = re.compile(rf"eval_(?:(.+)_)?episode/({'|'.join(EPISODE_METRICS)})")
ONLY_PANEL = "held-out"  # how an evaluation set is called that has no name


def write_viewer(runs: Sequence[str | os.PathLike], output: str | os.PathLike) -> None:
    """
    Write one HTML file in which one or two training runs can be looked at in a browser, also without a network.

    A file has at most 50 MB: of many episodes it has the tokens, and of very many the texts too, for a sample in which
    every run, step, evaluation set and outcome occurs. The same runs give the same file.

    Args:
        runs (`Sequence[str | os.PathLike]`): One or two folders that trainings wrote to (`output_dir`). Read are
            `trainer_state.json`, or that of the newest checkpoint, and the parquet files under `episodes/` (columns in
            `trl_epo.reports.episode_schema`); either may be missing.
        output (`str` or `os.PathLike`): The file to write. Its folder is made; a file that is there is replaced.

    Raises:
        ValueError: If there are not one or two different runs, a run has neither a log nor episodes, or a file in it
            cannot be read; the message names the file and what to do.
        FileNotFoundError: If a run's folder does not exist.
    """
    folders = [Path(run) for run in runs]
    if not 1 <= len(folders) <= 2 or len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"A page shows one run, or two different ones beside each other; got {list(map(str, runs))}.")
    names = _names(folders)
    curves, episodes = [], []
    for folder, name in zip(folders, names, strict=True):
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}: pass the `output_dir` of a training.")
        kept = _kept_episodes(folder, name)
        log = _log(folder)
        if log is None and not kept:
            raise ValueError(
                f"{folder} has neither a log (trainer_state.json, in it or in a checkpoint-*) nor kept episodes "
                "(episodes/**/*.parquet): pass the `output_dir` of a training that has saved a checkpoint or kept episodes."
            )
        curves.append(
            {"name": name, "logged": log is not None, **(_curves(log) if log else _curves_of_episodes(kept))}
        )
        episodes += kept

    order = _representative_order(episodes)
    texts = _fitting(order, lambda chosen: _chunks(episodes, chosen, WORDS, _text), TEXTS_SIZE)
    room = EPISODES_SIZE - sum(map(len, texts.chunks))
    tokens = _fitting(texts.chosen, lambda chosen: _chunks(episodes, chosen, SAMPLED, _tokens), room)
    shown = sorted(texts.chosen, key=lambda number: _place(episodes[number]))
    index = {name: [episodes[number][name] for number in shown] for name in (*PLACE, *OUTCOME, *CORRIDOR, "start")}
    index["text"] = [texts.where[number] for number in shown]
    index["tokens"] = [tokens.where.get(number) for number in shown]
    data = {
        "runs": curves,
        "episodes": index,
        "kept": len(episodes),
        "with_tokens": len(tokens.where),
    }
    _write(_page(data, texts.chunks, tokens.chunks), Path(output))


# ------------------------------------------------------------------------------------------------------------- reading


def _names(folders: list[Path]) -> list[str]:
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _log(folder: Path) -> list[dict[str, Any]] | None:
    """The log of a run's folder or, if it has none, of its newest checkpoint that has one."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    checkpoints.sort(key=lambda path: -int(path.name.removeprefix("checkpoint-")))
    file = next((file for place in (folder, *checkpoints) if (file := place / "trainer_state.json").is_file()), None)
    if file is None:
        return None
    try:
        history = json.loads(file.read_bytes())["log_history"]
        return [{**entry, "step": int(entry["step"])} for entry in history]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not the state of a trainer, or only a part of one ({type(error).__name__}: {error}): move it "
            "away, and the newest checkpoint's is read, or the page is made without a log."
        ) from error


def _kept_episodes(folder: Path, run: str) -> list[dict[str, Any]]:
    """What the list of episodes tells of each, and where it is."""
    import pyarrow as pa

    from .episode_schema import SCHEMA

    columns = [name for name in SCHEMA.names if name not in ("turns", "failures", "first_observation")]
    episodes = []
    for path in sorted((folder / "episodes").rglob("*.parquet")):
        try:
            file = _open(path)
            place = 0
            for batch in file.iter_batches(batch_size=1024, columns=[*columns, *_of_turns(file, ("entropies",))]):
                entropies = _mean_entropies(batch.column("turns"))
                for row, entropy in zip(batch.select(columns).to_pylist(), entropies, strict=True):
                    panel = (row["panel"] or ONLY_PANEL) if row["mode"] == "eval" else None
                    start = (panel, row["row"] if panel else None, row["environment"], row["seed"], row["options"])
                    row |= {"run": run, "panel": panel, "entropy": entropy, "file": path, "place": place}
                    row["start"] = zlib.crc32(repr(start).encode())
                    row |= {name: _number(row[name]) for name in ("return", "temperature", *CORRIDOR)}
                    episodes.append(row)
                    place += 1
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}: {error}): move it away, and the page is made from the "
                "other files."
            ) from error
    return episodes


def _open(path: Path) -> "pq.ParquetFile":
    import pyarrow.parquet as pq

    from .episode_schema import SCHEMA, VERSION

    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    versions = set(file.read(columns=["version"]).column("version").to_pylist()) if "version" in names else {None}
    if unknown := versions - {VERSION}:
        raise ValueError(
            f"{path} has episodes of version {', '.join(map(str, unknown))}, and this trl-epo reads version {VERSION}: "
            "use the trl-epo that wrote them."
        )
    fields = [f"turns.{name}" for name in (*WORDS, *SAMPLED) if not _of_turns(file, (name,))]
    if missing := [name for name in SCHEMA.names if name not in names] + fields:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)} of kept episodes: move it away.")
    return file


def _of_turns(file: "pq.ParquetFile", fields: Sequence[str]) -> list[str]:
    """The columns of a file that hold these fields of turns."""
    paths = [file.schema.column(number).path for number in range(len(file.schema.names))]
    parts = [path.split(".") for path in paths]
    return [
        path for path, part in zip(paths, parts, strict=True) if part[0] == "turns" and part[3:4] and part[3] in fields
    ]


def _mean_entropies(turns: "pa.ListArray") -> list[float | None]:
    """Of each episode, over its tokens, in nats; `None` where unknown."""
    import pyarrow as pa
    import pyarrow.compute as pc

    entropies = pc.struct_field(pc.list_flatten(turns), "entropies")
    episode = pc.take(pc.list_parent_indices(turns), pc.list_parent_indices(entropies))
    table = pa.table({"episode": episode, "entropy": pc.list_flatten(entropies)})
    means = table.group_by("episode").aggregate([("entropy", "mean")]).to_pydict()
    known = dict(zip(means["episode"], means["entropy_mean"], strict=True))
    return [_number(known.get(number)) for number in range(len(turns))]


def _number(value: Any, digits: int = 4) -> float | None:
    """A number as JSON can say it."""
    return round(float(value), digits) if isinstance(value, int | float) and math.isfinite(value) else None


# -------------------------------------------------------------------------------------------------------------- curves


def _curves(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The log as curves: metric -> (steps, values), of training and of each evaluation set."""
    train: dict[str, dict[int, float]] = defaultdict(dict)
    panels: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    wanted = {f"episode/{name}": name for name in EPISODE_METRICS} | {f"epo/{name}": name for name in EPO_METRICS}
    for entry in history:
        for key, value in entry.items():
            value = _number(value, digits=6)
            if value is None:
                continue
            if key in wanted:
                train[wanted[key]][entry["step"]] = value
            elif found := PANEL_METRIC.fullmatch(key):
                panels[found[1] or ONLY_PANEL][found[2]][entry["step"]] = value
    return {"train": _series(train), "panels": {name: _series(panels[name]) for name in sorted(panels)}}


def _curves_of_episodes(episodes: list[dict[str, Any]]) -> dict[str, Any]:
    """For a run without a log: means over the kept episodes of a step."""
    by_panel: dict[str | None, dict[int, list]] = defaultdict(lambda: defaultdict(list))
    for episode in episodes:
        if episode["stop_reason"] != "failure":
            by_panel[episode["panel"]][episode["step"]].append(episode)
    curves = {}
    for panel, steps in by_panel.items():
        metrics: dict[str, dict[int, float]] = defaultdict(dict)
        for step, batch in steps.items():
            for name, column in {"success_rate": "success", "return": "return", "turns": "num_turns"}.items():
                if known := [float(episode[column]) for episode in batch if episode[column] is not None]:
                    metrics[name][step] = sum(known) / len(known)
            if turns := sum(episode["num_turns"] for episode in batch):
                metrics["invalid_actions"][step] = sum(episode["num_invalid"] for episode in batch) / turns
            if panel is None and (known := [e["entropy"] for e in batch if e["entropy"] is not None]):
                metrics["entropy"][step] = sum(known) / len(known)
                for name in CORRIDOR:
                    if batch[0][name] is not None:
                        metrics[name][step] = batch[0][name]
        curves[panel] = _series(metrics)
    return {"train": curves.pop(None, {}), "panels": {name: curves[name] for name in sorted(curves)}}


def _series(metrics: dict[str, dict[int, float]]) -> dict[str, tuple[list[int], list[float]]]:
    return {name: (sorted(points), [points[step] for step in sorted(points)]) for name, points in metrics.items()}


# ------------------------------------------------------------------------------------------------------------ episodes


def _place(episode: dict[str, Any]) -> tuple:
    """In what order episodes are listed."""
    names = ("step", "mode", "panel", "run", "rl_step", "row")
    return tuple((episode[name] is not None, episode[name]) for name in names)


def _representative_order(episodes: list[dict[str, Any]]) -> list[int]:
    """Numbers of episodes, in an order whose beginning has each run, step, panel and outcome before any of them twice."""
    draws = {n: zlib.crc32(repr(_place(episode)).encode()) for n, episode in enumerate(episodes)}
    seen: Counter = Counter()
    ranks = {}
    for number in sorted(draws, key=lambda number: (draws[number], number)):
        episode = episodes[number]
        kind = tuple(episode[name] for name in ("run", "step", "mode", "panel", "success", "stop_reason"))
        ranks[number] = seen[kind]
        seen[kind] += 1
    return sorted(ranks, key=lambda number: (ranks[number], draws[number], number))


class _Chunks:
    """Episodes packed together, and where each is: number -> (chunk, place in it)."""

    def __init__(self, chosen: list[int]):
        self.chosen = chosen
        self.chunks: list[str] = []
        self.where: dict[int, tuple[int, int]] = {}


def _fitting(order: list[int], pack: Callable[[list[int]], _Chunks], room: int) -> _Chunks:
    """As many episodes as have room, in bytes, from the beginning of `order`."""
    count = len(order)
    if count > TRIAL:
        size = sum(map(len, pack(order[:TRIAL]).chunks))
        count = min(count, int(TRIAL * room / size))
    while True:
        packed = pack(order[:count])
        size = sum(map(len, packed.chunks))
        if size <= room:
            return packed
        count = int(0.95 * count * room / size)


def _chunks(
    episodes: list[dict[str, Any]], chosen: list[int], fields: Sequence[str], pick: Callable[[dict[str, Any]], Any]
) -> _Chunks:
    packed = _Chunks(chosen)
    waiting: list[Any] = []

    def flush() -> None:
        packed.chunks.append(_packed(waiting))
        waiting.clear()

    for number, row in _rows(episodes, set(chosen), fields):
        packed.where[number] = (len(packed.chunks), len(waiting))
        waiting.append(pick(row))
        if len(waiting) == CHUNK:
            flush()
    if waiting:
        flush()
    return packed


def _rows(episodes: list[dict[str, Any]], chosen: set[int], fields: Sequence[str]) -> Iterator[tuple[int, dict]]:
    """The chosen episodes, file by file, with these fields of their turns."""
    numbers: dict[Path, dict[int, int]] = defaultdict(dict)
    for number in chosen:
        numbers[episodes[number]["file"]][episodes[number]["place"]] = number
    for path in sorted(numbers):
        file, start = _open(path), 0
        columns = [*_of_turns(file, fields), "first_observation", "options", "failures"]
        for batch in file.iter_batches(batch_size=256, columns=columns):
            places = [place for place in range(batch.num_rows) if start + place in numbers[path]]
            for place, row in zip(places, batch.take(places).to_pylist() if places else (), strict=True):
                yield numbers[path][start + place], row
            start += batch.num_rows


def _text(row: dict[str, Any]) -> dict[str, Any]:
    turns = [turn | {name: _number(turn[name]) for name in ("reward", "advantage")} for turn in row["turns"] or ()]
    return {
        "first_observation": row["first_observation"],
        "options": row["options"],
        "failures": row["failures"] or [],
        "turns": [[turn[name] for name in WORDS] for turn in turns],
    }


def _tokens(row: dict[str, Any]) -> list[Any]:
    turns = row["turns"] or ()
    return [[turn["tokens"] or [], *(_numbers(turn[name]) for name in SAMPLED[1:])] for turn in turns]


def _numbers(values: Iterable[float] | None) -> list[float | None]:
    # `_number` of each; there are millions
    return [round(value, 4) if value is not None and math.isfinite(value) else None for value in values or ()]


# ---------------------------------------------------------------------------------------------------------------- page


def _packed(value: Any) -> str:
    """JSON, compressed, as characters that mean nothing to a browser."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def _page(data: dict[str, Any], texts: list[str], tokens: list[str]) -> str:
    def read(name: str) -> str:
        return (PAGE / name).read_text(encoding="utf-8")

    def allowed(code: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"

    library = f"/*\nuPlot, https://github.com/leeoniya/uPlot\n\n{read('uPlot.LICENSE')}*/\n{read('uPlot.iife.min.js')}"
    script, style = read("app.js"), f"{read('uPlot.min.css')}\n{read('style.css')}"
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"script-src {allowed(library)} {allowed(script)}; style-src {allowed(style)}; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    blocks = [("data", _packed(data))]
    blocks += [(f"text-{number}", chunk) for number, chunk in enumerate(texts)]
    blocks += [(f"tokens-{number}", chunk) for number, chunk in enumerate(tokens)]
    parts = {
        "POLICY": policy,
        "STYLE": style,
        "LIBRARY": library,
        "SCRIPT": script,
        # A block of a type that is no script is never run.
        "DATA": "\n".join(f'<script type="text/plain" id="{name}">{block}</script>' for name, block in blocks),
    }
    return re.sub(r"@@(\w+)@@", lambda found: parts[found[1]], read("template.html"))


def _write(page: str, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        unfinished.write_text(page, encoding="utf-8", newline="\n")
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
