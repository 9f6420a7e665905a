"""The page of a run, by what a user does with it in a real browser."""

import base64
import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_run import write_log, write_rows, write_run

from trl_epo.reports import viewer
from trl_epo.reports.episode_schema import SCHEMA
from trl_epo.reports.viewer import write_viewer


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    found = importlib.util.find_spec("selenium") is not None
    if found:
        from browser import browser, programs

        found = programs() is not None
    if not found:
        assert os.environ.get("CI") != "true", "install chromium, chromium-driver (Debian) and selenium (PyPI)"
        pytest.skip("needs chromium, chromedriver and selenium")
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of two runs, small ones, whose episodes began alike."""
    folder = tmp_path_factory.mktemp("runs")
    size = {"steps": 40, "every": 10, "groups": 1, "group_size": 4, "eval_every": 20, "panel_size": 3}
    write_run(folder / "epo", seed=0, **size)
    write_run(folder / "none", seed=1, collapsing=True, **size)
    return folder / "epo", folder / "none"


@pytest.fixture(scope="module")
def files(runs, tmp_path_factory):
    """The page of one run, and of both."""
    folder = tmp_path_factory.mktemp("pages")
    write_viewer(runs[:1], folder / "one.html")
    write_viewer(runs, folder / "two.html")
    return folder / "one.html", folder / "two.html"


def rows_of(run):
    files = sorted((run / "episodes").rglob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def found(page):
    return page.text("#found span")


def choose(page, field, value):
    page.run("const e = document.getElementById(arguments[0]); e.focus(); e.value = arguments[1];", field, value)
    page.run(
        "for (const name of ['input', 'change']) document.getElementById(arguments[0]).dispatchEvent(new Event(name))",
        field,
    )


def open_row(page, number):
    page.all(".row")[number].click()
    page.wait(lambda: page.all("#detail .about"))


def place_shown(page):
    """Run, set, step, RL step and row of the episode in the link."""
    return re.match(r"#episode=([^&]+)", page.run("return location.hash"))[1].split("/")


# -------------------------------------------------------------------------------------------------------------- curves


def test_curves_tell_the_run_and_lead_to_its_episodes(page, files, runs):
    page.visit(files[0])
    titles = page.texts(".chart h2")
    assert titles[:2] == ["Success rate", "Entropy in its corridor"]
    assert {"Return", "Turns", "Invalid actions", "Early and late turns", "Outside the corridor"} < set(titles)
    assert "Bonus and penalty" in titles and "Force on the mean entropy" not in titles  # not logged in this run

    history = json.loads((runs[0] / "trainer_state.json").read_text())["log_history"]
    last = [entry["eval_ood_episode/success_rate"] for entry in history if "eval_ood_episode/success_rate" in entry][
        -1
    ]
    legend = page.text(".chart:first-child .u-legend")
    assert "train" in legend and "iid" in legend and f"ood{100 * last:.1f}".removesuffix(".0") in legend

    page.drag(page.all(".u-over")[1], 0.02, 0.55)
    page.wait(lambda: page.text("#range b"))
    low, high = map(int, re.findall(r"\d+", page.text("#range b")))
    assert (low, high) == (1, 22)  # of 40
    inside = [row for row in rows_of(runs[0]) if low <= row["step"] <= high]
    assert page.text("#range span").startswith(f"{len(inside)} episodes")
    page.one("#show-range").click()
    page.wait(lambda: page.all("#detail .about"))
    assert found(page).startswith(f"{len(inside)} episodes")


def test_two_runs_lie_over_each_other(page, files):
    page.visit(files[1])
    legend = page.text(".chart:first-child .u-legend")
    assert all(name in legend for name in ("epo train", "epo iid", "none train", "none ood"))
    assert page.texts(".short h2") == ["epo", "none"]


# ------------------------------------------------------------------------------------------------------------ episodes


def test_filters_leave_what_they_say(page, files, runs):
    rows = rows_of(runs[0])
    page.visit(files[0])
    page.one("#tab-episodes").click()
    assert found(page).startswith(f"{len(rows)} episodes")

    def number(condition):
        return sum(map(condition, rows))

    filters = {
        "f-set": ("ood", lambda row: row["panel"] == "ood"),
        "f-task": ("put", lambda row: row["task"] == "put"),
        "f-success": ("no success", lambda row: row["success"] is False),
        "f-stop": ("failure", lambda row: row["stop_reason"] == "failure"),
        "f-from": ("20", lambda row: row["step"] >= 20),
        "f-to": ("20", lambda row: row["step"] <= 20),
    }
    for field, (value, condition) in filters.items():
        choose(page, field, value)
        assert 0 < number(condition) < len(rows)
        assert re.match(rf"{number(condition)} episodes?\b", found(page)), field
        page.one("#found button").click()
        assert found(page).startswith(f"{len(rows)} episodes")

    choose(page, "f-set", "train")
    choose(page, "f-from", "20")
    assert found(page).startswith(f"{number(lambda r: r['mode'] == 'train' and r['step'] >= 20)} episodes")
    page.one("#found button").click()

    turns = [turn for row in rows for turn in row["turns"]]
    for name in ("text", "observation"):
        wanted = turns[5][name].lower()
        number_of = number(lambda row, name=name, wanted=wanted: any(wanted in t[name].lower() for t in row["turns"]))
        assert 0 < number_of < len(rows) / 2
        page.press("/")
        page.press(turns[5][name].upper())
        page.wait(lambda number_of=number_of: re.match(rf"{number_of} episodes?\b", found(page)))
        page.one("#found button").click()


def test_an_episode_turn_by_turn(page, files, runs):
    page.visit(files[0])
    page.one("#tab-episodes").click()
    choose(page, "f-set", "train")
    choose(page, "f-from", "20")  # from here on there is a corridor
    open_row(page, 0)
    run, kind, step, _, row = place_shown(page)
    assert (run, kind) == ("epo", "train")
    [episode] = [r for r in rows_of(runs[0]) if (r["mode"], r["step"], r["row"]) == ("train", int(step), int(row))]
    assert page.text(".about h2").endswith(f"{episode['task']}, step {step}")
    assert len(page.all(".turn")) == len(episode["turns"])
    assert page.texts(".turn .env pre") == [turn["observation"] for turn in episode["turns"]]
    assert page.texts(".turn .said") == ["".join(turn["tokens"]) for turn in episode["turns"]]
    actions = [turn["action"] for turn in episode["turns"]]
    assert page.texts(".turn .act :last-child") == [action or "none found in the text" for action in actions]
    tags = page.run("return Array.from(document.querySelectorAll('.turn'), e => !!e.querySelector('.card.invalid'))")
    assert tags == [not turn["valid"] for turn in episode["turns"]]
    advantages = [f"{turn['advantage']:+.2f}".replace("-", "−") for turn in episode["turns"]]
    assert [re.search(r"advantage (\S+\d\d)", text)[1].lstrip("+") for text in page.texts(".turn > header")] == [
        text.lstrip("+") for text in advantages
    ]

    entropies = [value for turn in episode["turns"] for value in turn["entropies"]]
    assert len(page.all(".turn .tok.above")) == sum(value > episode["corridor_high"] for value in entropies) > 0
    assert len(page.all(".turn .tok.below")) == sum(value < episode["corridor_low"] for value in entropies) > 0

    assert page.all(".about .turn-chart .u-over")  # entropy of each turn

    token = 4
    page.point_at(page.all(".turn:nth-of-type(1) .tok, .turn .tok")[token])
    page.wait(lambda: page.run("return !document.getElementById('tip').hidden"))
    tip, first = page.text("#tip"), episode["turns"][0]
    assert f"“{first['tokens'][token]}”" in tip
    assert f"{first['entropies'][token]:.3f} nats" in tip
    assert f"{first['logprobs'][token]:.3f} (p = ".replace("-", "−") in tip

    assert page.texts("details pre") == []
    page.one(".turn details summary").click()
    page.wait(lambda: page.texts("details pre") == [first["prompt"]])

    page.all(".shades button")[-1].click()  # plain
    assert page.texts(".turn .said") == [turn["text"] for turn in episode["turns"]]
    page.all(".shades button")[0].click()


def test_keys(page, files):
    page.visit(files[0])
    page.press("j")
    page.wait(lambda: page.all("#detail .about"))
    first = place_shown(page)
    page.press("j")
    page.wait(lambda: place_shown(page) != first)
    page.press("k")
    page.wait(lambda: place_shown(page) == first)
    assert page.run("return document.querySelector('.row[aria-selected=true]') !== null")
    page.press("?")
    page.wait(lambda: page.run("return document.getElementById('help').open"))
    assert "next episode" in page.text("#help")
    page.escape()
    page.wait(lambda: not page.run("return document.getElementById('help').open"))
    page.press("/")
    assert page.run("return document.activeElement.id") == "f-text"
    page.press("jk?")
    assert page.run("return document.activeElement.value") == "jk?"
    page.escape()
    assert page.run("return document.activeElement.id") != "f-text"


def test_the_same_row_of_two_runs_and_at_two_steps(page, files):
    page.visit(files[1])
    page.one("#tab-episodes").click()
    choose(page, "f-set", "iid")
    open_row(page, 0)
    run, *place = place_shown(page)
    page.press("c")
    page.wait(lambda: len(page.all(".pair.two .about")) == 2)
    other, *place_there = place_shown(page)
    assert {run, other} == {"epo", "none"} and place == place_there  # the same row, of the other run
    left, right = page.all(".pair.two .start pre")
    assert left.text == right.text

    chip = next(chip for chip in page.all(".about:nth-child(2) .chip") if chip.text.endswith("40"))
    chip.click()
    page.wait(lambda: place_shown(page)[2] == "40")
    assert place_shown(page)[-1] == place[-1] and "beside=" in page.run("return location.hash")
    page.escape()
    page.wait(lambda: len(page.all(".about")) == 1)
    assert "beside=" not in page.run("return location.hash")


def test_a_link_leads_to_what_was_shown(page, files):
    page.visit(files[1])
    page.press("j")
    page.press("j")
    page.press("c")
    page.wait(lambda: len(page.all(".about h2")) == 2)
    link, titles = page.run("return location.hash"), page.texts(".about h2")
    page.visit(files[1], link)
    page.wait(lambda: page.texts(".about h2") == titles)
    page.visit(files[1], "#episode=gone/train/1/1/1")
    assert "not in this page" in page.text("#message")


def test_light_and_dark(page, files):
    def background():
        return page.run("return getComputedStyle(document.body).backgroundColor")

    def brightness():
        return sum(map(int, re.findall(r"\d+", background())[:3])) / 3

    try:
        page.prefer("dark")
        page.visit(files[0])
        assert brightness() < 60
        page.prefer("light")
        page.wait(lambda: brightness() > 200)
        page.one("#theme").click()
        page.wait(lambda: brightness() < 60)
        page.one("#tab-episodes").click()
        page.one("#theme").click()
        page.wait(lambda: brightness() > 200)
        page.one("#tab-curves").click()  # drawn anew while they were out of sight
        fits = "return document.querySelector('.uplot').offsetWidth / document.querySelector('.chart').offsetWidth"
        page.wait(lambda: 0.9 < page.run(fits) < 1)
    finally:
        page.prefer("light")
        page.run("localStorage.clear()")


def test_thousands_of_episodes_open(page, runs, tmp_path):
    rows = rows_of(runs[0])
    rows = [row | {"turns": row["turns"][:2]} for row in rows]
    rows = [rows[n % len(rows)] | {"step": n // len(rows), "rl_step": n // len(rows)} for n in range(5000)]
    write_rows(rows, tmp_path / "run" / "episodes" / "all.parquet")
    write_viewer([tmp_path / "run"], tmp_path / "page.html")
    page.visit(tmp_path / "page.html")
    page.one("#tab-episodes").click()
    assert found(page).startswith("5,000 episodes")
    assert len(page.all(".row")) < 60  # only those in sight
    page.run("const list = document.getElementById('list'); list.scrollTop = list.scrollHeight")
    page.wait(lambda: page.run("return document.querySelector('.row[aria-posinset=\"5000\"]') !== null"))
    page.all(".row")[-1].click()
    page.wait(lambda: page.all(".turn"))


# ------------------------------------------------------------------------------------------------------- hostile texts

HOSTILE = (
    '<img src=x onerror="window.pwned=1;alert(1)"></script><script>window.pwned=1;alert(1)</script><!--<script>'
    "<svg onload=alert(1)></title></style></textarea><iframe src='https://example.invalid/'></iframe>"
    '<a href="javascript:alert(1)">here</a>&lt;b&gt;@@DATA@@ \u2028\u2029 \u202eevil\u202c \x1b[31m \x00 \ufeff ${1} `'
)


def test_hostile_texts_do_nothing(page, runs, tmp_path):
    rows = rows_of(runs[0])[:8]
    for number, row in enumerate(rows):
        names = ("task", "environment", "options", "stop_reason", "first_observation")
        row |= dict.fromkeys(names, HOSTILE) | {"mode": "eval", "panel": HOSTILE if number % 2 else "__proto__"}
        row["failures"] = [{"kind": HOSTILE, "turn": 1, "cause": HOSTILE}]
        for turn in row["turns"]:
            turn |= dict.fromkeys(("prompt", "text", "action", "observation"), HOSTILE)
            turn["tokens"] = [HOSTILE for _ in turn["tokens"]]
    run = tmp_path / "<img src=x onerror=alert(1)>"
    write_rows(rows, run / "episodes" / "eval" / "rows.parquet")
    log = {f"eval_{panel}_episode/success_rate": 0.5 for panel in (HOSTILE, "__proto__", "constructor", "\ud800")}
    write_log([{"step": 1, "episode/success_rate": 0.5, **log}, {"step": 2, **log}], run)
    write_viewer([run], tmp_path / "page.html")
    # Nothing of a run is in the file as it is, so nothing of it can end a script or begin a tag.
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "pwned" not in written and "onerror" not in written and "\u202e" not in written

    page.requests()
    page.visit(tmp_path / "page.html")
    scripts = page.run("return document.scripts.length")
    page.press("j")
    page.wait(lambda: page.all(".turn"))
    page.press("c")
    page.wait(lambda: len(page.all(".about")) == 2)
    page.one(".turn details summary").click()
    page.point_at(page.one(".turn .tok"))
    page.wait(lambda: page.run("return !document.getElementById('tip').hidden"))
    page.press("/")
    page.press("<script>")
    page.wait(lambda: found(page).startswith("8 episodes"))
    page.run("location.hash = '#episode=<img src=x onerror=alert(1)>&beside=<script>'")
    page.one("#tab-curves").click()

    assert page.run("return window.pwned") is None
    assert page.run("return document.scripts.length") == scripts
    assert (
        page.run("return document.querySelectorAll('img, svg, iframe, object, embed, a[href^=javascript]').length")
        == 0
    )
    assert page.requests() == [(tmp_path / "page.html").as_uri()]
    assert page.complaints() == []  # no refused script either: there was none
    shown = page.text(".turn .said")
    assert "<script>window.pwned=1;alert(1)</script>" in shown
    assert r"\u202eevil" in shown and r"\x1b[31m" in shown and r"\x00" in shown
    everything = page.run("return document.body.innerText")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b\ufeff]", everything)
    assert len(page.all(".chart")) == 1  # the page works on: success of all four sets

    # What would get in all the same does not run.
    for injection in (
        "const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; document.body.append(s)",
        "const i = document.createElement('img'); i.setAttribute('onerror', 'window.pwned = 1'); document.body.append(i)",
        "document.body.innerHTML = '<img src=x onerror=\"window.pwned = 1\">'",
        "setTimeout('window.pwned = 1')",
        "const i = document.createElement('img'); i.src = 'http://127.0.0.1:9/x'; document.body.append(i)",
    ):
        page.run(f"try {{ {injection} }} catch {{}}")
    assert (
        page.chrome.execute_async_script("setTimeout(() => arguments[0](window.pwned ?? 'nothing'), 200)") == "nothing"
    )
    assert not [address for address in page.requests() if address.startswith("http")]


def test_no_request_and_no_complaint(page, files):
    page.requests()
    page.complaints()
    page.visit(files[1])
    page.press("j")
    page.wait(lambda: page.all(".turn"))
    assert page.requests() == [files[1].as_uri()]
    assert page.complaints() == []


# ------------------------------------------------------------------------------------------------------------ the file


def unpacked(file):
    blocks = re.findall(r'<script type="text/plain" id="([\w-]+)">(.*?)</script>', file.read_text(encoding="utf-8"))
    return {name: json.loads(gzip.decompress(base64.b64decode(block))) for name, block in blocks}


def test_a_sample_has_every_step_and_outcome(page, runs, tmp_path, monkeypatch):
    rows = rows_of(runs[0])
    write_rows([row | {"row": n} for n in range(12) for row in rows], tmp_path / "run" / "episodes" / "all.parquet")
    monkeypatch.setattr(viewer, "TRIAL", 32)
    monkeypatch.setattr(viewer, "TEXTS_SIZE", 60_000)
    monkeypatch.setattr(viewer, "EPISODES_SIZE", 100_000)
    write_viewer([tmp_path / "run"], tmp_path / "page.html")
    blocks = unpacked(tmp_path / "page.html")
    episodes = blocks["data"]["episodes"]

    def kinds(columns):
        names = ("mode", "panel", "step", "success", "stop_reason")
        return Counter(zip(*(columns[name] for name in names), strict=True))

    everything = kinds({name: [row[name] for row in rows] for name in SCHEMA.names if name != "turns"})
    assert kinds(episodes).keys() == everything.keys()
    number, tokens = len(episodes["step"]), sum(place is not None for place in episodes["tokens"])
    assert 0 < tokens < number < 12 * len(rows) == blocks["data"]["kept"]
    assert (tmp_path / "page.html").stat().st_size < 100_000 + 200_000  # with the page itself

    write_viewer([tmp_path / "run"], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "page.html").read_bytes()

    page.visit(tmp_path / "page.html")
    assert f"a sample of {number:,}" in page.text("#notes") and f"for {tokens:,} of" in page.text("#notes")
    assert "has no log" in page.text("#notes") and page.texts(".chart h2")[0] == "Success rate"
    page.run("location.hash = '#episodes'")
    without = next(n for n, place in enumerate(episodes["tokens"]) if place is None)
    for _ in range(without + 1):
        page.press("j")
    page.wait(lambda: "texts alone" in (page.text(".about") or ""))
    assert page.texts(".turn .said")


def test_a_log_alone_makes_a_page(page, runs, tmp_path):
    for step, text in ((9, "not this one"), (10, (runs[0] / "trainer_state.json").read_text())):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    write_viewer([tmp_path / "run"], tmp_path / "new" / "page.html")
    page.visit(tmp_path / "new" / "page.html")
    assert len(page.all(".chart")) == 8
    assert "no kept episodes" in page.text("#notes")
    assert page.run("return document.getElementById('tab-episodes').disabled")


def test_what_is_missing_or_broken_is_named(runs, tmp_path):
    def refused(error, match, *folders):
        with pytest.raises(error, match=match):
            write_viewer(folders, tmp_path / "page.html")
        assert not list(tmp_path.glob("*page.html*"))

    refused(ValueError, "one run, or two")
    refused(ValueError, "one run, or two", *runs, tmp_path)
    refused(ValueError, "two different ones", runs[0], runs[0])
    refused(FileNotFoundError, "no folder .*gone.*output_dir", tmp_path / "gone")
    run = tmp_path / "run"
    run.mkdir()
    refused(ValueError, "neither a log .* nor kept episodes", run)
    (run / "trainer_state.json").write_text('{"log_history": [{"st')
    refused(ValueError, r"trainer_state\.json is not the state of a trainer.*move it away", run)
    (run / "trainer_state.json").unlink()
    file = run / "episodes" / "train" / "rows.parquet"
    whole = next((runs[0] / "episodes").rglob("*.parquet"))
    write_rows(pq.read_table(whole).to_pylist(), file)
    write_viewer([run], tmp_path / "fine.html")
    file.write_bytes(whole.read_bytes()[:-100])
    refused(ValueError, r"rows\.parquet cannot be read .*move it away", run)
    table = pq.read_table(whole)
    pq.write_table(table.set_column(0, "version", pa.array([99] * len(table), pa.int32())), file)
    refused(ValueError, r"rows\.parquet has episodes of version 99, and this trl-epo reads version 1", run)
    pq.write_table(table.drop_columns(["step"]), file)
    refused(ValueError, r"rows\.parquet lacks the columns step", run)
    pq.write_table(pa.table({"text": ["another"]}), file)
    refused(ValueError, r"rows\.parquet has episodes of version None", run)


def test_odd_values_make_a_page(page, runs, tmp_path):
    """Numbers that are not finite, tokens without values, an episode without turns, no columns that may be null."""
    rows = rows_of(runs[0])[:4]
    rows[0] |= {"turns": [], "num_turns": 0, "return": float("nan"), "success": None, "stop_reason": "failure"}
    for turn in rows[1]["turns"]:
        turn |= {"tokens": None, "token_ids": None, "logprobs": None, "entropies": None, "reward": float("inf")}
    for turn in rows[2]["turns"]:
        turn |= {"logprobs": [None for _ in turn["tokens"]], "entropies": [float("nan") for _ in turn["tokens"]]}
    rows[3] |= {"turns": None, "num_turns": 0, "failures": None}
    rows = [
        row | {"task": None, "options": None, "rl_step": None, "group": None, "first_observation": None}
        for row in rows
    ]
    write_rows(rows, tmp_path / "run" / "episodes" / "rows.parquet")
    write_log([{"step": 1, "episode/return": float("nan"), "epo/entropy": 1.0, "loss": 0.1}], tmp_path / "run")
    write_viewer([tmp_path / "run"], tmp_path / "page.html")
    page.visit(tmp_path / "page.html")
    page.complaints()
    for _ in rows:
        page.press("j")
        page.wait(lambda: page.all("#detail .about"))
        page.press("c")
        page.press("c")
    assert page.complaints() == []


def test_needs_neither_torch_nor_trl(runs, tmp_path):
    code = (
        "import sys\n"
        "for name in ('torch', 'trl', 'transformers', 'datasets'): sys.modules[name] = None\n"
        "import trl_epo.reports.viewer as viewer\n"
        "assert 'pyarrow' not in sys.modules\n"
        "viewer.write_viewer(sys.argv[1:2], sys.argv[2])\n"
    )
    arguments = [sys.executable, "-c", code, str(runs[0]), str(tmp_path / "page.html")]
    subprocess.run(arguments, check=True, timeout=300)
    assert (tmp_path / "page.html").stat().st_size > 50_000
