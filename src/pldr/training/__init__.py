"""A recipe to a model."""


class TrainingInterrupted(RuntimeError):
    """The run was asked to stop, and saved a checkpoint first. Stands here so that it can be caught without torch.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal = signal_number
