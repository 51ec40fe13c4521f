"""The backends: what one is, which there are, and the choice among them."""

from __future__ import annotations

import functools
import importlib
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.interpolation import join_unknown

logger = logging.getLogger(__name__)

PACKAGED = {
    "triton": "icnn_zoo.ops.triton_backend.TritonBackend",
    "native": "icnn_zoo.ops.native_backend.NativeBackend",
    "torch": "icnn_zoo.ops.torch_backend.TorchBackend",
}
"""The package's own, imported when they are first asked for; "auto" takes the first that can run, at last "torch"."""


class BackendError(RuntimeError):
    """A backend found out while computing that it cannot run on a device, and says so from now on; why, in words."""


class Backend(Protocol):
    """What computes the operator, as :class:`icnn_zoo.ops.torch_backend.TorchBackend` does.

    One that computes more than bilinear interpolation says so: ``interpolations = ("bilinear", "triangle", ...)``. It
    then gets positions with spreads [..., T, 4], see :mod:`icnn_zoo.ops.tap_reading`, and their gradients are of that
    shape too.
    Positions of which one coordinate is no number come with both NaN; one that gives NaN to whatever such a tap feeds
    by itself says ``joins_unknown = True`` and gets them as they are.
    One that cannot take images of every size also has ``too_large(geometry)``, which says why, or None.
    """

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on a device, None if it can."""

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether it computes in a dtype."""

    def forward(
        self, input: Tensor, weight: Tensor, positions: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        """The output [B, N, Ho, Wo], in the memory format of ``input`` [B, C, H, W].

        ``weight`` is [N, C / G, T], ``positions`` are absolute [C, T, 2], or [N, C / G, T, 2] in the full version.
        """

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        positions: Tensor,
        geometry: Geometry,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients for input, weight and positions, None where not in ``needs``."""


_registered: dict[str, Backend] = {}


def register_backend(name: str, backend: Backend) -> None:
    """Adds a backend of your own in this process: ``backend=name`` computes with it, "auto" does not take it.

    Checks, padding, dtypes, autograd of any order, ``torch.func``, ``torch.compile`` and export stay the package's own.

    Args:
        name: What ``backend`` is called.
        backend: An object or module with the functions of :class:`Backend`.

    Raises:
        ValueError: The name is taken.
        TypeError: A function is missing.

    Example:
        >>> from icnn_zoo.ops import register_backend, unregister_backend
        >>> from icnn_zoo.ops.torch_backend import TorchBackend
        >>> register_backend("mine", TorchBackend())
        >>> import icnn_zoo, torch
        >>> layer = icnn_zoo.IrregularConv2d(2, 3, 3)
        >>> layer.backend = "mine"
        >>> layer(torch.zeros(1, 2, 5, 5)).shape
        torch.Size([1, 3, 3, 3])
        >>> unregister_backend("mine")
    """
    if name in (*names(), "auto", "reference"):
        raise ValueError(f"`name`: there is a backend {name!r} already; known are {', '.join(names())}.")
    missing = [part for part in ("unavailable", "supports", "forward", "backward") if not hasattr(backend, part)]
    if missing:
        raise TypeError(f"`backend` must have {', '.join(missing)}; see icnn_zoo.ops.Backend.")
    _registered[name] = backend


def unregister_backend(name: str) -> None:
    """Removes a backend that :func:`register_backend` added, so that its name is free again.

    Raises:
        ValueError: No backend was registered under this name.
    """
    if name not in _registered:
        known = ", ".join(map(repr, _registered)) or "none"
        raise ValueError(f"`name`: no backend {name!r} was registered; registered are {known}.")
    del _registered[name]


def names() -> tuple[str, ...]:
    """The names of all backends but "auto" and "reference"."""
    return (*PACKAGED, *_registered)


def get_backend(name: str) -> Backend:
    """The backend of a name other than "auto" and "reference"."""
    return _registered[name] if name in _registered else _packaged(name)


@functools.cache
def _packaged(name: str) -> Backend:
    module, _, kind = PACKAGED[name].rpartition(".")
    backend: Backend = getattr(importlib.import_module(module), kind)()
    return backend


def why_unavailable(
    name: str, device: torch.device, dtype: torch.dtype, geometry: Geometry | None = None
) -> str | None:
    """Why a backend cannot compute on a device in a dtype (and a geometry, if given), or None if it can."""
    backend = get_backend(name)
    interpolation = "bilinear" if geometry is None else geometry.reading.interpolation
    if interpolation not in getattr(backend, "interpolations", ("bilinear",)):
        return f"it does not compute {interpolation} interpolation"
    reason = backend.unavailable(device)
    if reason is None and not backend.supports(dtype):
        reason = f"it does not compute {dtype}"
    if reason is None and geometry is not None and hasattr(backend, "too_large"):
        reason = backend.too_large(geometry)
    return reason


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, geometry: Geometry | None = None) -> str:
    """The name of the backend that computes; for "auto" that of the first one that can run.

    Raises:
        RuntimeError: The backend asked for cannot run; the message says why.
    """
    if name != "auto":
        reason = why_unavailable(name, device, dtype, geometry)
        if reason is not None:
            raise RuntimeError(f'`backend`={name!r} cannot run: {reason}. `backend`="auto" takes one that can.')
        return name
    *preferred, last = PACKAGED
    for candidate in preferred:
        reason = why_unavailable(candidate, device, dtype, geometry)
        if reason is None:
            return candidate
        logger.debug("`backend`=%r cannot run: %s.", candidate, reason)
    return last


def forward(
    name: str, input: Tensor, weight: Tensor, positions: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """Calls a backend's ``forward``; "auto" goes on to the next one where a backend gives up.

    Raises:
        RuntimeError: The backend asked for cannot run; the message says why.
    """

    def call(backend: Backend) -> Tensor:
        return backend.forward(input, weight, _known(positions, backend), bias, geometry)

    output: Tensor = _run(name, input, geometry, call)
    return output


def backward(
    name: str,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Calls a backend's ``backward``, as :func:`forward` does."""

    def call(backend: Backend) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return backend.backward(grad_output, input, weight, _known(positions, backend), geometry, needs)

    grads: tuple[Tensor | None, Tensor | None, Tensor | None] = _run(name, input, geometry, call)
    return grads


def _run(name: str, input: Tensor, geometry: Geometry, call: Callable[[Backend], Any]) -> Any:
    failed = None
    while True:
        chosen = choose_backend(name, input.device, input.dtype, geometry)
        try:
            return call(get_backend(chosen))
        except BackendError as error:
            if name != "auto" or chosen == failed:
                raise RuntimeError(f"`backend`={chosen!r} cannot run: {error}.") from error
            failed = chosen
            warnings.warn(
                f"The backend {chosen!r} cannot run on {input.device}: {error}. Slower ones compute there instead.",
                RuntimeWarning,
                stacklevel=3,
            )


def _known(positions: Tensor, backend: Backend) -> Tensor:
    """Positions as a backend wants them: see ``joins_unknown`` in :class:`Backend`."""
    if getattr(backend, "joins_unknown", False):
        return positions
    # To see that there is nothing to join takes less time; on a GPU that is to wait.
    known = positions.device.type == "cpu" and math.isfinite(positions.detach().sum().item())
    return positions if known else join_unknown(positions)
