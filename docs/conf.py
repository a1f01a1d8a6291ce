"""Sphinx configuration. Build: .venv/bin/sphinx-build -W docs build/docs (needs the extra `docs`; no network)."""

project = "moe_train"
author = "the moe_train authors"
extensions = ["myst_nb"]
html_theme = "furo"
html_title = "moe_train"
html_static_path = ["_static"]
exclude_patterns = ["**/.ipynb_checkpoints"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# Notebooks are shown with the outputs that are stored in them; the slow tests execute them.
nb_execution_mode = "off"
