"""Sphinx: ``sphinx-build -W examples/guide build/guide``, with ``pip install '.[docs]'``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import secondorder

project = "secondorder"
author = "the authors of secondorder"
release = secondorder.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
exclude_patterns = ["build"]
suppress_warnings: list[str] = []

autodoc_member_order = "bysource"
# The options stand once, with their meaning, in the docstring; a signature of 25 of them is read line by line.
autodoc_typehints = "none"
maximum_signature_line_length = 88
napoleon_use_rtype = False
napoleon_use_ivar = True
myst_heading_anchors = 3
