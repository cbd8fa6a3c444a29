"""Somebody else's embeddings: named without their secrets, and failing under one name."""

from types import SimpleNamespace

import pytest

from rlm_plugins.errors import RetrievalError, UsageError
from rlm_plugins.retrieval.foreign import foreign_fingerprint, searching


def fingerprint(**attributes: object) -> str:
    return foreign_fingerprint("f", SimpleNamespace(**attributes), names=("model",), settings=("dimensions",))


def test_a_fingerprint_follows_model_and_settings_and_nothing_else() -> None:
    assert fingerprint(model="a") != fingerprint(model="b")
    assert fingerprint(model="a", dimensions=8) != fingerprint(model="a", dimensions=16)
    assert fingerprint(model="a", api_key="canary") == fingerprint(model="a")
    assert "canary" not in fingerprint(model="a", api_key="canary")


@pytest.mark.parametrize("model", [None, "", "unknown", 3])
def test_a_model_that_nothing_names_is_refused(model: object) -> None:
    with pytest.raises(UsageError, match="fingerprint="):
        fingerprint(model=model)


def test_what_fails_there_is_a_retrieval_error_with_its_cause() -> None:
    with pytest.raises(RetrievalError, match="ZeroDivisionError") as caught, searching(object()):
        raise ZeroDivisionError
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_our_own_errors_pass_as_they_are() -> None:
    with pytest.raises(UsageError, match="mine"), searching(object()):
        raise UsageError("mine")
