"""The example runs, offline."""

import runpy
from pathlib import Path

import pytest

import rlm_plugins
from rlm_plugins.testing import forbid_requests

EXAMPLE = Path(__file__).parents[2] / "examples" / "langchain_chain.py"


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    if not all(hasattr(rlm_plugins, name) for name in ("embedded_reader", "embedded_encoder")):
        pytest.skip("the embedded reader and encoder are not shipped")
    with forbid_requests():
        runpy.run_path(str(EXAMPLE))
    assert "the world says" in capsys.readouterr().out
    assert len(EXAMPLE.read_text().splitlines()) < 60
