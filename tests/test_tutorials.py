"""The tutorials that combine methods: their code runs, and shows what they say it shows."""

import re
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).resolve().parent.parent / "docs" / "tutorials"


def run(name: str) -> dict[str, Any]:
    """Execute the code of a tutorial, block after block, and return its names."""
    text = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text[: block.start(1)].count("\n")
        # Blank lines in front make a traceback name the tutorial's own line.
        exec(compile("\n" * line + block[1], f"{name}.md", "exec"), names)
    return names


def test_every_exit_is_distilled_and_a_learned_policy_decodes() -> None:
    names = run("early-exit-distillation")
    assert names["same_tokens"]
    speedup = names["speedup"]
    assert speedup["after", "learned policy"] > 1.3
    assert speedup["after", "learned policy"] > speedup["before", "learned policy"]
