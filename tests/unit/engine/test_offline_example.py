"""The example in examples/ runs as its own docstring says."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "offline.py"


def test_offline_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["offline.py"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "cached tokens: 32 cold, 48 warm, 32 after the flush"
    answers = [line.split("from the cache")[1] for line in lines if "from the cache" in line]
    assert len(answers) == 9
    assert answers[:3] == answers[3:6] == answers[6:]
