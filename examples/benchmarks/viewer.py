"""
How long the page of a run takes to write and to open: a run of many episodes, its file, and headless Chromium.

    python examples/benchmarks/viewer.py --episodes 5000

The run is made up (`tests/support/synthetic_run.py`): the real household game, with answers and tokens that are drawn.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path


sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
from browser import browser
from synthetic_run import write_run

from trl_epo.reports import write_viewer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=5000, help="how many, about")
    parser.add_argument("--times", type=int, default=5, help="how often the page is opened")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = args.episodes // 64  # of training, and some more episodes of evaluation
        count = write_run(folder / "run", steps=steps, every=1, groups=8, group_size=8)
        start = time.perf_counter()
        write_viewer([folder / "run"], folder / "page.html")
        megabytes = (folder / "page.html").stat().st_size / 1e6
        print(f"{count:,} episodes: written in {time.perf_counter() - start:.1f} s, {megabytes:.1f} MB")
        with browser(folder / "profile") as page:
            for _ in range(args.times):
                page.visit(folder / "page.html")
                ready = page.run("return performance.getEntriesByName('ready')[0].startTime")
                page.one("#tab-episodes").click()
                opened = page.chrome.execute_async_script(
                    "const done = arguments[0], start = performance.now();"
                    "new MutationObserver(() => requestAnimationFrame(() => done(performance.now() - start)))"
                    ".observe(document.getElementById('detail'), {childList: true});"
                    "document.querySelectorAll('.row')[3].click()"
                )
                start = time.perf_counter()
                page.press("/")
                page.press("zzz")
                page.wait(lambda: page.text("#found span") == "0 episodes")
                searched = time.perf_counter() - start
                print(
                    f"list and curves after {ready:,.0f} ms, an episode after {opened:,.0f} ms, a search {searched:.1f} s"
                )


if __name__ == "__main__":
    main()
