"""Devices that are only described, for what can be said about a mesh without running on it."""


class Device:
    """What a mesh asks of a device: who it is, and where it stands."""

    def __init__(self, number, *, process=0, in_slice=None, coords=None):
        self.id, self.process_index = number, process
        self.platform, self.device_kind = ("cpu", "cpu") if coords is None else ("tpu", "TPU v5")
        if in_slice is not None:
            self.slice_index = in_slice
        if coords is not None:
            self.coords, self.core_on_chip = coords, 0


def eight(**about):
    return [Device(number, **{name: of(number) for name, of in about.items()}) for number in range(8)]
