"""What can stand in front of a model, each alone and in any order: a cache, retries, limits, a budget.

    lm = CachedModel(RetryingModel(LimitedModel(endpoint, max_concurrency=4)), "answers.sqlite")

Each is a `LanguageModel` over a `LanguageModel`, so that every method takes it.
"""

from .budget import Budget, BudgetedModel, BudgetExceeded, Price
from .cache import CachedModel
from .limits import LimitedModel
from .retry import RetryingModel

__all__ = ["Budget", "BudgetExceeded", "BudgetedModel", "CachedModel", "LimitedModel", "Price", "RetryingModel"]
