"""`python -m moe_train` is `moe-train`."""

from moe_train.cli.main import main

main()
