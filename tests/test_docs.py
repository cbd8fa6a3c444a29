"""What the README, the pages and the examples say is run."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"langchain": "langchain_core", "llama_index": "llama_index.core"}


def python_blocks() -> list[object]:
    """Every Python block that stands for itself. A page's blocks build on each other unless they import anew."""
    return [
        pytest.param(block, id=f"{page.name}-{number}")
        for page in PAGES
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
    ]


def require(text: str) -> None:
    for word, module in NEEDS.items():
        if word in text:
            pytest.importorskip(module)


@pytest.mark.parametrize("block", python_blocks())
def test_a_code_block_runs(block: str) -> None:
    require(block)
    exec(compile(block, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_and_is_short(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = path.read_text()
    require(text)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert len(text.splitlines()) < 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_links_to_what_exists(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing
