"""In CI a test skipped for want of a package is a failure, unless the tier says that it does without the package."""

import os
import re

import pytest

_lacking: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or not isinstance(report.longrepr, tuple):
        return
    reason = report.longrepr[2]
    lacking = re.search(r"could not import '([\w.]+)'|needs (\w+)", reason)
    may_lack = os.environ.get("RLM_MAY_LACK", "").split(",")
    if lacking and (lacking[1] or lacking[2]).split(".")[0] not in may_lack:
        _lacking.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _lacking and os.environ.get("CI") == "true":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _lacking and os.environ.get("CI") == "true":
        terminalreporter.section("skipped for want of a part, which CI does not allow")
        for line in _lacking:
            terminalreporter.line(line)
