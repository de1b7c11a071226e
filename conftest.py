"""For tests and notebooks alike: what a run leaves behind is its failure."""

pytest_plugins = ["tests.left_behind", "tests.notebook_memory"]
