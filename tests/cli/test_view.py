"""`trl-epo view`; the page itself is in `tests/reports/test_viewer.py`."""

import pytest
from synthetic_run import write_run

from trl_epo import cli


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, steps=4, every=2, panel_size=2)
    return folder


def test_the_page_lies_in_the_runs_folder(run, capsys):
    cli.main(["view", str(run)])
    assert (run / "viewer.html").stat().st_size > 50_000
    assert capsys.readouterr().out.startswith(f"{run / 'viewer.html'} (")


def test_two_runs_and_another_file(run, tmp_path):
    write_run(tmp_path / "other", seed=1, steps=2, every=2, panel_size=2)
    cli.main(["view", str(run), str(tmp_path / "other"), "--output", str(tmp_path / "both.html")])
    assert (tmp_path / "both.html").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "required: RUN"),
        (("a", "b", "c"), 2, "3 runs are given, but the page shows one or two"),
        (("a", "--outptu", "b"), 2, "no option --outptu. Did you mean '--output'?"),
        (("no-such-run",), 1, "no-such-run"),
    ],
)
def test_what_cannot_be_shown(arguments, code, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["view", *arguments])
    assert end.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trl-epo view: error: ") and message in line
