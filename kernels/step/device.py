"""The device on which a step runs: a CUDA device or the CPU."""

import contextlib

import torch


def resolve_device(device: torch.device | str | int) -> torch.device:
    """The CPU, or a CUDA device with its index.

    Args:
        device: "cpu", a CUDA device, or the index of a CUDA device. A CUDA device without an
            index is torch's current device.

    Raises:
        ValueError: the device is of another type.
    """
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"device is {str(device)!r}; accepted: a CUDA device or 'cpu'")
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which a CUDA device is torch's current device. For the CPU it does nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
