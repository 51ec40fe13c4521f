"""At the end of a run: a table and a picture of it beside stored results."""

from lightning.pytorch.callbacks import Callback


class Comparison(Callback):
    """To be written."""

    def __init__(self, experiment: str = "lines", network: str = "plain5.lines_regular") -> None:
        self.experiment = experiment
        self.network = network
