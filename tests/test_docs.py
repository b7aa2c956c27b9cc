# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""The pages' Python examples run, and the API page is complete."""

import re
from pathlib import Path

import pytest

import pyro_flipout

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    "page", ["start.md", "which_models.md", "layers.md", "guides.md", "arviz.md"]
)
def test_examples_run(page):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": page})


def test_api_page_is_complete():
    text = (DOCS / "api.md").read_text()
    assert [name for name in pyro_flipout.__all__ if f" pyro_flipout.{name}\n" not in text] == []
