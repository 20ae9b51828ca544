"""The documentation site, `make docs`: the repository's own pages, so that links hold in both."""

from importlib.metadata import version as version_of

project = "lightning_maml"
author = "the lightning_maml authors"
version = release = version_of("lightning_maml")

root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**", "benchmarks/*.md"]
exclude_patterns = ["docs/conf.py", "docs/site"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
]

napoleon_use_ivar = True  # of named tuples: autodoc has their attributes already

html_theme = "furo"
html_title = "lightning_maml"
html_extra_path = ["site"]  # leads from the top to docs/index.html

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "cache"  # `make docs` runs all
nb_execution_cache_path = "build/docs-cache"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600

nitpicky = True  # our own references must lead somewhere
nitpick_ignore_regex = [
    # other projects' are not looked up, so that the site builds without a network
    (
        "py:.*",
        r"(collections|contextlib|lightning|matplotlib|nn|numpy|pathlib|torch|torchmetrics|torchvision|typing)\..*",
    ),
    ("py:.*", r"lightning_maml\.core\..*"),  # what functions of the core hand each other
]
