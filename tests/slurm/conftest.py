"""The model and the texts of the end-to-end tests."""

from end_to_end.conftest import site

__all__ = ["site"]
