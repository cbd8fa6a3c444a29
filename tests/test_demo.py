"""The demo's own parts; the whole of it runs as a user would run it."""

from pathlib import Path

import pytest

from rlm_plugins.cli import main
from rlm_plugins.demo import example_world, read_folder
from rlm_plugins.errors import UsageError
from rlm_plugins.loopback import LoopbackEndpoint
from rlm_plugins.testing import ScriptedModel


def test_the_example_world_asks_what_its_corpus_answers_and_one_thing_it_does_not() -> None:
    corpus, asked = example_world()
    text = "\n".join(passage.text for passage in corpus)
    assert all(one.expected in text for one in asked if one.expected is not None)
    assert sum(one.expected is None for one in asked) == 1


def test_a_folder_becomes_paragraphs_with_their_file_as_title(tmp_path: Path) -> None:
    (tmp_path / "towns.md").write_text("Tokarin is old.\n\n  \nTokarin is red.\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    passages = read_folder(tmp_path)
    assert [(p.id, p.title, p.text) for p in passages] == [
        ("towns.md#0", "towns", "Tokarin is old."),
        ("towns.md#1", "towns", "Tokarin is red."),
    ]


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_a_folder_without_text_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no text was found"):
        read_folder(tmp_path / folder)


def test_the_command_answers_through_both_frameworks(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("langchain_core")
    pytest.importorskip("llama_index.core")
    assert main(["demo", "--k", "3"]) == 0
    out = capsys.readouterr().out
    _, asked = example_world()
    assert all(one.question in out for one in asked)
    assert out.count("REPLUG, LangChain") == out.count("REPLUG, LlamaIndex") == len(asked)
    assert "left out" not in out


def test_your_own_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("langchain_core")
    (tmp_path / "a.txt").write_text("Tokarin was founded by Gelorin Demov.\n\nThe flag of Tokarin is red.")
    assert main(["demo", "--docs", str(tmp_path), "--ask", "Who founded Tokarin?"]) == 0
    assert "Gelorin Demov" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--docs", "nowhere", "--ask", "Who?"], "no text was found"), (["--k", "0", "--ask", "Who?"], "k must be")],
)
def test_a_wrong_argument_is_one_line_and_an_exit_status(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_probing_an_endpoint_prints_what_it_gives_and_what_that_makes_possible(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("openai")
    with LoopbackEndpoint(ScriptedModel({"": "one two"})) as endpoint:
        assert main(["probe", "--base-url", endpoint.base_url, "--model", "scripted"]) == 0
    out = capsys.readouterr().out
    assert "output_logprobs      True" in out
    assert "scoring a given text    yes" in out
    assert "REPLUG, token mixture" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--base-url"),
        (["--base-url", "http://127.0.0.1:9/v1"], "--model NAME"),
        (["--tokenizer", "folder"], "pass --base-url"),
        (["--base-url", "http://127.0.0.1:9/v1", "--model", "m", "--api-key-env", "RLM_NO_SUCH_KEY"], "holds no key"),
    ],
)
def test_probing_says_what_is_missing(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", *arguments]) == 2
    assert message in capsys.readouterr().err
