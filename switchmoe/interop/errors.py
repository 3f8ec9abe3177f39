"""What ends a conversion that can't go on, as one sentence."""


class WeightsError(ValueError):
    """Weights or a configuration that can't be read, or can't be written in the form that was asked for."""
