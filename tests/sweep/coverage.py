"""docs/coverage.md."""

from tests.sweep.results import Results


def document(results: Results) -> str:
    return ""
