"""``python -m icnn_zoo.cli``, by which Lightning starts further processes."""

from icnn_zoo.cli.programs import zoo_main

zoo_main()
