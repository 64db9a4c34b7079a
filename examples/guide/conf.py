"""For ``sphinx-build -W examples/guide build/guide``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import secondorder

project = "secondorder"
author = "the authors of secondorder"
release = secondorder.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_show_copyright = False
exclude_patterns = ["build"]

autodoc_member_order = "bysource"
maximum_signature_line_length = 88
napoleon_use_ivar = True
myst_heading_anchors = 3
