"""docs/losses.md: every block runs, in order, in one session."""

import pathlib
import re

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "losses.md"


def test_examples_run():
    text = PAGE.read_text()
    session: dict = {}
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.S))
    assert len(blocks) > 10
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        source = "\n" * line + block.group(1)  # so that a traceback names the line of the page
        exec(compile(source, str(PAGE), "exec"), session)
