"""The README's support matrix is what the wrappers and the check at the door say today."""

from __future__ import annotations

import pytest
import support_matrix


@pytest.mark.slow
def test_the_readme_says_what_the_wrappers_say():
    assert support_matrix.section() in support_matrix.README.read_text()
