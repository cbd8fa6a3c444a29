"""Finding passages, and scores that can be compared whatever found them."""

from .dense import DenseRetriever, Metric
from .fusion import FusionRetriever, fuse
from .identity import content_id, identified
from .scores import (
    CachedEmbedder,
    Scores,
    ascore_by_embeddings,
    rescored,
    score_by_embeddings,
    score_by_rank,
    score_uniform,
    scored,
)

__all__ = [
    "CachedEmbedder",
    "DenseRetriever",
    "FusionRetriever",
    "Metric",
    "Scores",
    "ascore_by_embeddings",
    "content_id",
    "fuse",
    "identified",
    "rescored",
    "score_by_embeddings",
    "score_by_rank",
    "score_uniform",
    "scored",
]
