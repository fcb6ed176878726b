"""What the commands share: options that name a model, files to read and to write."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import click

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from scoresolve.models import Model
    from scoresolve.sde import GaussianSDE
    from scoresolve.targets import GaussianMixture

__all__ = [
    "ARRAYS",
    "MOVING",
    "PAGE",
    "PICTURE",
    "PROCESSES",
    "REPORT",
    "TARGETS",
    "OutFile",
    "device_of",
    "leave",
    "model_options",
    "process_of",
    "read_array",
    "save_arrays",
    "sizes_of",
    "target_of",
]

PROCESSES = {
    "vp": "VP",
    "subvp": "SubVP",
    "cosine": "CosineVP",
    "ve": "VE",
    "edm": "EDM",
    "flow": "RectifiedFlow",
}
READINGS = ("score", "eps", "x0", "v", "flow", "denoiser")
TARGETS = ("ring", "random")
MODEL_OPTIONS = (
    *("model", "digits", "weights", "target", "prediction", "process", "process_options"),
)


class OutFile(click.Path):
    """A file to write, refused before any work is done if it could not be written later.

    Args:
        *endings: what its name may end in; anything if empty.
    """

    def __init__(self, *endings: str) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)
        self.endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if self.endings and path.suffix not in self.endings:
            self.fail(f"{path}: the name must end in {' or '.join(self.endings)}", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"{path}: there is no folder {path.parent}, make it first", param, ctx)
        return path


PAGE = OutFile(".html")
REPORT = OutFile(".md", ".html", ".json")
ARRAYS = OutFile(".safetensors", ".npz")
PICTURE = OutFile(".png", ".pdf", ".svg")
MOVING = OutFile(".png", ".pdf", ".svg", ".gif", ".mp4")


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say which model is meant; `command` gets what `_resolve` makes of them."""

    @wraps(command)
    def resolved(**options: Any) -> None:
        chosen = {name: options.pop(name) for name in MODEL_OPTIONS}
        given = {name: value for name, value in options.items() if value is not None}
        command(*_resolve(**chosen), **given)

    options = [
        click.option("--model", metavar="MODULE:NAME", help="Your callable net(x, t)."),
        click.option("--digits", is_flag=True, help="The bundled network of 8x8 digits."),
        click.option("--weights", type=click.Path(exists=True), help="Other weights of it."),
        click.option("--target", type=click.Choice(TARGETS), help="A mixture with known answers."),
        click.option(
            "--prediction",
            type=click.Choice(READINGS),
            help="What your --model predicts [score].",
        ),
        click.option(
            "--sde",
            "process",
            type=click.Choice(list(PROCESSES)),
            help="[edm for a denoiser, else vp]",
        ),
        click.option(
            "--sde-option",
            "process_options",
            multiple=True,
            metavar="KEY=NUMBER",
            help="E.g. T=0.9.",
        ),
    ]
    for option in options[::-1]:
        option(resolved)
    return resolved


def process_of(name: str, options: tuple[str, ...]) -> GaussianSDE:
    import scoresolve

    values: dict[str, float] = {}
    for option in options:
        key, _, number = option.partition("=")
        try:
            values[key] = float(number)
        except ValueError:
            raise click.BadParameter(f"{option!r}: give KEY=NUMBER, as beta_max=20") from None
    try:
        process: GaussianSDE = getattr(scoresolve, PROCESSES[name])(**values)
    except TypeError as error:
        raise click.BadParameter(f"the process {name!r} has no such option: {error}") from None
    return process


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise click.BadParameter(f"--model {reference}: {error}: give MODULE:NAME") from None
    finally:
        sys.path.pop(0)


def _resolve(
    model: str | None,
    digits: bool,
    weights: str | None,
    target: str | None,
    prediction: str | None,
    process: str | None,
    process_options: tuple[str, ...],
) -> tuple[Model | Callable[..., Tensor], GaussianSDE, tuple[int, ...] | None]:
    """The model, its process and, where it is known, the shape of one sample."""
    import scoresolve as ss
    from scoresolve.models import NetworkModel

    if (model is not None) + (digits or weights is not None) + (target is not None) != 1:
        raise click.UsageError("give one of --model, --digits (or --weights) and --target")
    if prediction is not None and model is None:
        raise click.UsageError("--prediction tells how to read --model: leave it out")
    denoiser = (model is None and target is None) or prediction == "denoiser"
    sde = process_of(process or ("edm" if denoiser else "vp"), process_options)
    if target is not None:
        mixture = target_of(target)
        return mixture.score_model(sde), sde, mixture.event_shape
    if model is None:
        from scoresolve.digits import load_network

        return ss.from_denoiser(load_network(weights)), sde, (1, 8, 8)
    net = _load(model)
    if isinstance(net, ss.Model):
        if prediction is not None:
            raise click.UsageError(f"{model} knows what it predicts: leave out --prediction")
        return net, sde, None
    if not callable(net):
        raise click.BadParameter(f"--model {model} is {type(net).__name__}: name a callable")
    _require_no_conditions(model, net)
    if denoiser:
        return ss.from_denoiser(net, sde if isinstance(sde, ss.EDM) else None), sde, None
    return NetworkModel(net, sde, prediction or "score"), sde, None


def _require_no_conditions(name: str, net: Callable[..., Any]) -> None:
    try:
        inspect.signature(getattr(net, "forward", net)).bind(None, None)
    except TypeError as error:
        raise click.BadParameter(
            f"--model {name} is called as net(x, t): {error}; wrap what needs conditions"
        ) from None
    except ValueError:  # what is written in C may have no signature
        return


def target_of(name: str) -> GaussianMixture:
    from scoresolve.targets import random_mixture, ring

    return ring() if name == "ring" else random_mixture(16, 10, seed=0)


def save_arrays(path: Path, arrays: dict[str, Tensor]) -> None:
    if path.suffix == ".npz":
        import numpy as np

        stored: dict[str, Any] = {name: value.cpu().numpy() for name, value in arrays.items()}
        np.savez(path, **stored)
    else:
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in arrays.items()}, path)


def read_array(path: Path) -> Tensor:
    """The array named "x" of a file, or its only one."""
    import numpy as np
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix not in (".safetensors", ".npz", ".npy"):
        raise click.BadParameter(f"{path}: give a .safetensors, .npz or .npy file")
    try:
        if path.suffix == ".safetensors":
            arrays = load_file(path)
        elif path.suffix == ".npz":
            with np.load(path) as stored:
                arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
        else:
            arrays = {"x": torch.from_numpy(np.load(path))}
    except (EOFError, TypeError, ValueError, BadZipFile, SafetensorError) as error:
        raise click.BadParameter(f"{path} cannot be read as arrays: {error}") from None
    if "x" not in arrays and len(arrays) != 1:
        raise click.BadParameter(f"{path} holds {', '.join(arrays)}: name one array x")
    return arrays.get("x", next(iter(arrays.values())))


def device_of(name: str | None) -> torch.device | None:
    import torch

    if name is None:
        return None
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise click.BadParameter(f"--device {name} cannot be used here: {reason}") from None


def leave(status: Tensor) -> None:
    """Exit unless every sample is good: with 130 if a keyboard interrupt is why, else with 1."""
    from scoresolve.errors import Status

    if bool((status == int(Status.INTERRUPTED)).any()):
        raise KeyboardInterrupt
    if bool((status != int(Status.OK)).any()):
        raise SystemExit(1)


def sizes_of(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise click.BadParameter(f"--shape {text}: give whole numbers, as 64,3,32,32") from None
