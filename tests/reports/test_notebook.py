"""What a notebook shows while training runs, in a real kernel."""

import re

import pytest
from conftest import child_environment


CELLS = """
from pathlib import Path
from datasets import Dataset
from faulty_runs import make_trainer
from trl_epo.reports import notebook
notebook.SECONDS_BETWEEN_FIGURES = 0.0
notebook.DRAWING_SHARE = 1e9
rows = Dataset.from_dict({{"length": [2, 3]}})
kwargs = dict(disable_tqdm=False, per_device_eval_batch_size=4, num_generations_eval=2)
trainer = make_trainer(
    Path({folder!r}), dataset={{"iid": rows, "<ood>": rows}}, max_steps=25, eval_strategy="steps", eval_steps=20, **kwargs
)
---
trainer.train()
---
trainer.evaluate()
---
import sys
sys.modules["matplotlib.figure"] = None  # as if there were none
make_trainer(Path({folder!r}), max_steps=2, disable_tqdm=False).train()
---
import signal
from faulty_runs import When
stops = When("on_step_end", 1, lambda: signal.raise_signal(signal.SIGINT))
trainer = make_trainer(Path({folder!r}), stops, dataset=rows, **kwargs)
try:
    trainer.train()
except KeyboardInterrupt:
    pass
---
trainer.evaluate()
"""


def cells_of(table: str) -> list[list[str]]:
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The HTML that each cell has displayed: by cell, by display, in its order."""
    manager = pytest.importorskip("jupyter_client").KernelManager()
    pytest.importorskip("ipykernel")
    folder = tmp_path_factory.mktemp("notebook")
    environment = child_environment(IPYTHONDIR=str(folder / "ipython"), JUPYTER_RUNTIME_DIR=str(folder))
    manager.start_kernel(env=environment)
    client = manager.client()
    client.start_channels()
    said = []

    def run(cell: str) -> list[list[str]]:
        displays, new = {}, []

        def note(message):
            content = message["content"]
            if message["msg_type"] == "stream":
                said.append(content["text"])
            if message["msg_type"] in ("display_data", "update_display_data"):
                name = content["transient"]["display_id"]
                if message["msg_type"] == "display_data":
                    new.append(name)
                assert name in new  # one that was updated before it was there would not be seen
                displays.setdefault(name, []).append(content["data"]["text/html"])

        reply = client.execute_interactive(cell, timeout=300, output_hook=note)
        assert reply["content"]["status"] == "ok", reply["content"].get("traceback", said)
        return list(displays.values())

    try:
        client.wait_for_ready(timeout=300)
        yield [run(cell) for cell in CELLS.format(folder=str(folder / "run")).split("---")]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "epo/entropy" not in "".join(said)  # nor is anything printed


def test_one_display_with_a_table_that_is_bounded_and_curves_that_grow(shown):
    (updates,) = shown[1]
    images = [image for html in updates for image in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    assert len(set(images)) > 2
    steps, panels = re.findall(r"<table>.*?</table>", updates[-1])
    names, *rows = cells_of(steps)
    assert names == ["step", "success", "return", "invalid", "entropy", "corridor", "tokens/s", "seconds"]
    assert [row[0] for row in rows] == [f"{step}/25" for step in range(6, 26)]
    rates = [row[1] for row in rows if row[1] != "-"]  # episodes are played every four steps
    assert len(rates) == 5 and all(re.fullmatch(r"\d+\.\d%", rate) for rate in rates)
    names, *rows = cells_of(panels)
    assert names == ["panel", "step", "success", "95 %", "return", "episodes"]
    assert [row[:2] for row in rows] == [["iid", "20"], ["&lt;ood&gt;", "20"], ["iid", "25"], ["&lt;ood&gt;", "25"]]
    assert "step 25 of 25" in updates[-1] and 'value="25" max="25"' in updates[-1]
    assert any("left</div>" in html for html in updates)


def test_an_evaluation_by_itself(shown):
    assert len(shown[2]) == 2
    for name, updates in zip(("iid", "&lt;ood&gt;"), shown[2], strict=True):
        (panels,) = re.findall(r"<table>.*?</table>", updates[-1])
        assert [row[0] for row in cells_of(panels)[1:]] == [name]
        assert "<progress" not in updates[-1]


def test_without_matplotlib_the_table_stays(shown):
    (updates,) = shown[3]
    assert not any("<img" in html for html in updates)
    (steps,) = re.findall(r"<table>.*?</table>", updates[-1])
    assert len(cells_of(steps)) == 3


def test_an_evaluation_after_an_interrupted_training(shown):
    (training,), (evaluation,) = shown[4:]
    assert "step 1 of 7" in training[-1]
    assert "<progress" not in evaluation[-1]
    assert len(re.findall(r"<table>.*?</table>", evaluation[-1])) == 1
