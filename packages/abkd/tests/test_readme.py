"""The code in the card runs as it stands: its Python blocks, in turn, on tiny real models."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
pytestmark = pytest.mark.usefixtures("without_type_checks")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.skipif(not README.is_file(), reason="the card is beside the source tree only")
def test_the_code_in_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: list[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    student, teacher = (AutoModelForCausalLM.from_pretrained(pair[i]) for i in (2, 4))
    names: dict[str, Any] = {
        "student": student,
        "teacher": teacher,
        "tokenizer": AutoTokenizer.from_pretrained(pair[2]),
        "data": [{"prompt": "The quick", "completion": " brown fox"}] * 8,
    }
    before = student.lm_head.weight.detach().clone()
    with torch.random.fork_rng():
        for block in blocks:
            code = [line for line in block.splitlines() if line and not line.startswith("#")]
            assert len(code) <= 10
            exec(block, {**names})
    assert not torch.equal(student.lm_head.weight, before)
