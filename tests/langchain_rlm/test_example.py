"""The example runs, offline."""

import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlm_plugins.testing import forbid_requests

EXAMPLE = Path(__file__).parents[2] / "examples" / "langchain_chain.py"


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    reader = find_spec("rlm_plugins.reader")
    if reader is None or not (Path(str(reader.origin)).parent / "weights").is_dir():
        pytest.skip("the embedded reader's weights are not shipped")
    with forbid_requests():
        runpy.run_path(str(EXAMPLE))
    assert "the world says" in capsys.readouterr().out
    assert len(EXAMPLE.read_text().splitlines()) < 60
