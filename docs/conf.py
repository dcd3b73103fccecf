"""Sphinx configuration: Markdown through MyST, the furo theme, warnings are errors (`make docs`)."""

import re
from pathlib import Path

project = "popax"
author = "the popax authors"
copyright = "the popax authors; Apache-2.0"
# Read, not imported: the documentation builds without jax.
release = re.search(
    r'__version__ = "(.*)"', (Path(__file__).parents[1] / "popax" / "__init__.py").read_text(encoding="utf-8")
).group(1)

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "benchmarks", "plans"]
nitpicky = True
html_theme = "furo"
html_title = f"popax {release}"
