"""The notebooks run whole, each in a kernel of its own, with few steps."""

from pathlib import Path

import papermill
from conftest import make_model


NOTEBOOKS = Path(__file__).parent.parent / "examples" / "notebooks"


def run(name: str, folder: Path, monkeypatch, **parameters) -> str:
    """What its cells print."""
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    notebook = papermill.execute_notebook(
        NOTEBOOKS / name,
        folder / name,
        parameters={"OUTPUT_DIR": str(folder / "run"), **parameters},
        cwd=folder,
        progress_bar=False,
    )
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


def test_quickstart(tmp_path, monkeypatch):
    printed = run("epo_quickstart.ipynb", tmp_path, monkeypatch, WARM_UP_EPISODES=32, STEPS=2, PANEL_SIZE=8)
    assert "held-out success after EPO" in printed
    assert "--- not solved, 12 turns" in printed
    assert "No success after 12 turns (truncated)" in printed  # played from the saved model
    for left in ("model.safetensors", "README.md", "viewer.html"):
        assert (tmp_path / "run" / left).exists()


def test_gpu(tmp_path, monkeypatch, tokenizer):
    make_model(context_length=4096).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    printed = run(
        "epo_gpu.ipynb",
        tmp_path,
        monkeypatch,
        MODEL=str(tmp_path / "model"),
        DTYPE="float32",  # numbers of 16 bits are slow in matrices as small as these
        USE_VLLM=False,
        TURNS=5,
        WARM_UP_EPISODES=4,
        STEPS=2,
        HOUSES=1,
        EPISODES=2,
        MICRO_BATCH=2,
        PANEL_SIZE=2,
    )
    assert "held-out success:" in printed
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
