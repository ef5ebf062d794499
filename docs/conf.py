"""The documentation as a site: `make docs`, with warnings as errors."""

from lora_ext import __version__

project, author, copyright = "lora_ext", "lora_ext maintainers", "2026, lora_ext maintainers"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "lora_ext"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes, which types do not
autodoc_default_options = {"members": True, "show-inheritance": True}
# Texts are read on GitHub too, and name files of the repository there.
suppress_warnings = ["myst.xref_missing"]
