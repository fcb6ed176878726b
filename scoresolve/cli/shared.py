"""What the commands share: options that name a model, files to read and to write."""

from __future__ import annotations

import errno
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from zipfile import BadZipFile

import click

from scoresolve.cli.failures import Calls, first_line, traced
from scoresolve.errors import nearest_names
from scoresolve.files import is_kept, whole_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from scoresolve.models import Model
    from scoresolve.sde import GaussianSDE
    from scoresolve.targets import GaussianMixture

__all__ = [
    "ARRAYS",
    "DATA",
    "FOLDER",
    "MOVING",
    "PAGE",
    "PICTURE",
    "PROCESSES",
    "REPORT",
    "TARGETS",
    "OutFile",
    "OutFolder",
    "device_of",
    "leave",
    "may_overwrite",
    "model_options",
    "overwrite_option",
    "process_of",
    "read_array",
    "require_free",
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
OVERWRITE = "scoresolve.cli.overwrite"
"""Where the context keeps whether --overwrite was given."""
MODEL_OPTIONS = (
    *("model", "digits", "weights", "target", "prediction", "process", "process_options"),
)


class OutFile(click.Path):
    """A file to write, refused before any work is done if it could not be written later.

    One that exists is refused too, unless the command was given --overwrite.

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
        if not is_kept(path) and path.exists():  # a pipe or a device
            return path
        if not os.access(path.parent, os.W_OK | os.X_OK):
            self.fail(f"{path}: the folder {path.parent} cannot be written to", param, ctx)
        if is_kept(path) and not may_overwrite():
            self.fail(f"{path} exists: give --overwrite, or another name", param, ctx)
        return path


class OutFolder(click.Path):
    """A folder to write files into, made if it does not exist."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
        if not nearest.is_dir():
            self.fail(f"{path}: {nearest} is no folder", param, ctx)
        if not os.access(nearest, os.W_OK | os.X_OK):
            self.fail(f"{path}: the folder {nearest} cannot be written to", param, ctx)
        return path


def require_free(folder: Path, names: Iterable[str]) -> None:
    """Refuse files of these names in a folder, unless --overwrite was given."""
    found = [name for name in names if (folder / name).exists()]
    if found and not may_overwrite():
        raise click.UsageError(
            f"{folder} holds {', '.join(found)}: give --overwrite, or another folder"
        )


def overwrite_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--overwrite, without which an `OutFile` refuses what exists."""
    option = click.option(
        "--overwrite",
        is_flag=True,
        is_eager=True,  # read before the files are
        expose_value=False,
        callback=lambda ctx, _, value: ctx.meta.__setitem__(OVERWRITE, value),
        help="Replace files that exist.",
    )
    return option(command)


def may_overwrite() -> bool:
    """Whether --overwrite was given."""
    return bool(click.get_current_context().meta.get(OVERWRITE))


DATA = click.Path(exists=True, dir_okay=False, path_type=Path)
"""A file to read."""
PAGE = OutFile(".html")
REPORT = OutFile(".md", ".html", ".json")
ARRAYS = OutFile(".safetensors", ".npz")
FOLDER = OutFolder()
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
        click.option("--weights", type=DATA, help="Other weights of it."),
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
    """What `reference`, MODULE:NAME, names; modules are looked for in the working folder first."""
    module, _, name = reference.partition(":")
    if module.startswith("."):
        _refuse(reference, f"give the module's whole name, {module.lstrip('.')}:{name}")
    if module.endswith(".py") or "/" in module or os.sep in module:
        whole = ".".join(Path(module).with_suffix("").parts)
        _refuse(reference, f"{module} is a file, give its name as a module, as {whole}:{name}")
    if not module or not name:
        _refuse(reference, "give MODULE:NAME")
    _look_here()
    try:
        found = importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may do anything, exit too
        traced()
        if isinstance(error, ModuleNotFoundError) and _is_part(error.name, module):
            _refuse(reference, f"there is no module {error.name} in this folder or installed")
        _refuse(
            reference, f"importing {module} raised {first_line(error)}; --traceback shows where"
        )
    if not hasattr(found, name):
        if getattr(found, "__file__", None) is None:
            _refuse(reference, f"{module} is a folder without __init__.py: name a module in it")
        near = nearest_names(name, [each for each in vars(found) if not each.startswith("_")])
        hint = f"did you mean {', '.join(near)}?" if near else "give a name that it defines"
        _refuse(reference, f"the module {module} has no {name}: {hint}")
    return getattr(found, name)


def _refuse(reference: str, why: str) -> NoReturn:
    raise click.BadParameter(f"--model {reference}: {why}") from None


def _is_part(missing: str | None, module: str) -> bool:
    return missing is not None and f"{module}.".startswith(f"{missing}.")


def _look_here() -> None:
    """Import from the working folder too while the command runs, as `python -m` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)

    def undo() -> None:
        with suppress(ValueError):
            sys.path.remove(here)

    click.get_current_context().call_on_close(undo)


def _resolve(
    model: str | None,
    digits: bool,
    weights: Path | None,
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
        from safetensors import SafetensorError

        from scoresolve.digits import load_network

        try:
            network = load_network(weights)
        except SafetensorError as error:
            raise click.BadParameter(f"{weights} cannot be read as weights: {error}") from None
        return ss.from_denoiser(network), sde, (1, 8, 8)
    net, calls = _load(model), Calls(model)
    if isinstance(net, ss.Model):
        if prediction is not None:
            raise click.UsageError(f"{model} knows what it predicts: leave out --prediction")
        return net, sde, None
    if not callable(net):
        raise click.BadParameter(f"--model {model} is {type(net).__name__}: name a callable")
    if isinstance(net, type):
        raise click.BadParameter(
            f"--model {model} is a class: name an object, as net = {net.__name__}()"
        )
    _require_no_conditions(model, net)
    net = calls.watch(net)
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
        with whole_file(path) as aside:
            np.savez(aside, **stored)
    else:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        kept = {name: value.contiguous() for name, value in arrays.items()}
        with whole_file(path) as aside:
            try:
                save_file(kept, aside)
            except SafetensorError as error:  # also for a full disk
                raise OSError(errno.EIO, str(error), str(path)) from error


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
        held = ", ".join(arrays) or "nothing"
        raise click.BadParameter(f"{path} holds {held}: name one array x")
    x = arrays["x"] if "x" in arrays else next(iter(arrays.values()))
    if not x.ndim:
        raise click.BadParameter(f"{path} holds one number: give an array [N, *event]")
    return x


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
