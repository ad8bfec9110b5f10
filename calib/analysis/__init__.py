"""Questions about caches, detections and results, answered by DuckDB."""

from .catalogue import VARIABLES, Question, question, questions
from .query import Answer, ask, query
from .views import SOURCES, Views, open_views

__all__ = [
    "SOURCES",
    "VARIABLES",
    "Answer",
    "Question",
    "Views",
    "ask",
    "open_views",
    "query",
    "question",
    "questions",
]
