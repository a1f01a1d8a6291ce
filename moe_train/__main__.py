"""`python -m moe_train` is `moe-train`."""

from moe_train.cli import main

main()
