"""``python -m icnn_zoo``: the program ``icnn-zoo``."""

from icnn_zoo.cli.programs import zoo_main

zoo_main()
