# Copyright Contributors to the pyro_flipout project.
# SPDX-License-Identifier: Apache-2.0

"""Sphinx configuration. Build with ``sphinx-build -W docs docs/_build``; needs no network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from pyro_flipout import __version__

project = "pyro_flipout"
author = "Contributors to the pyro_flipout project"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "support_tables"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pyro_flipout {release}"

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"

# A reference to a name of this package that does not exist fails the build.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!pyro_flipout).*"),  # other projects: no inventory is fetched
    (r"py:class", r"pyro_flipout\..*\.(E|F|Fn|M)"),  # type variables
]
