"""Every script in examples/ runs and says something. In this process: importing torch and
Transformers anew for each takes longer than the scripts."""

import pathlib
import runpy

import pytest

SCRIPTS = sorted((pathlib.Path(__file__).parents[1] / "examples").glob("*.py"))


def test_there_is_one_for_every_family() -> None:
    assert {p.stem for p in SCRIPTS} >= {"grounding_dino", "lightglue", "lxmert", "vilbert", "clip"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_example(script: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()
