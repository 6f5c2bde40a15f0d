"""How busy a GPU is by its driver's own count, through NVML's C library, which comes with every driver."""

import ctypes
import threading
from contextlib import AbstractContextManager
from statistics import fmean
from types import TracebackType

import torch

_EVERY_S = 0.2
_STALE_READINGS = 5
"""The first second of readings still averages over what was before."""


class _Rates(ctypes.Structure):
    """nvmlUtilization_t: percent of the driver's last sampling period (1/6 to 1 s) with a kernel running, or memory in use."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class DriverUtilization(AbstractContextManager["DriverUtilization"]):
    """Share of the time inside the `with` block in which a kernel ran on torch's first GPU. None without NVML.

    The engine's device times are spans between two events in the stream, so gaps between the kernels of a unit count as
    busy there; here they do not.
    """

    share: float | None = None
    readings: int = 0

    def __enter__(self) -> "DriverUtilization":
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="utilization", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        device = _handle()
        if device is None:
            return
        nvml, handle = device
        shares, rates = [], _Rates()
        while not self._stop.wait(_EVERY_S):
            if nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates)) == 0:
                shares.append(rates.gpu / 100)
        shares = shares[_STALE_READINGS:]
        self.readings = len(shares)
        self.share = fmean(shares) if shares else None


def _handle() -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    if not torch.cuda.is_available():
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode()
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)) != 0:
        return None
    return nvml, handle
