"""The code of the method card runs."""

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.mark.filterwarnings("default:only")  # an untrained model admits few words
def test_the_code_of_the_method_card_runs() -> None:
    [code] = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["out"].score.shape == (8,)
    assert len(code.strip().splitlines()) <= 10
