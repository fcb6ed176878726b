"""The command line: the verbs, certificates and pictures for a shell.

Exit codes: 0 done, 1 a certificate, a model or a sample failed, 2 the call cannot be right,
130 interrupted.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
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

__all__ = ["main"]

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


class _Group(click.Group):
    """Shows the package's own errors and all warnings as one line; errors exit with code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        from scoresolve.errors import ScoresolveError

        def warn(message: Warning | str, *_: object, **__: object) -> None:
            click.echo(f"scoresolve: warning: {message}", err=True)

        try:
            with warnings.catch_warnings():
                warnings.showwarning = warn
                return super().invoke(ctx)
        except ScoresolveError as error:
            click.echo(f"scoresolve: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("scoresolve: interrupted", err=True)
            ctx.exit(130)


class _OutFile(click.Path):
    """A file to write, refused before any work is done if it could not be written later."""

    def __init__(self, *endings: str) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)
        self.endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if path.suffix not in self.endings:
            self.fail(f"{path}: the name must end in {' or '.join(self.endings)}", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"{path}: there is no folder {path.parent}, make it first", param, ctx)
        return path


PAGE = _OutFile(".html")
REPORT = _OutFile(".md", ".html", ".json")
ARRAYS = _OutFile(".safetensors", ".npz")
PICTURE = _OutFile(".png", ".pdf", ".svg")
MOVING = _OutFile(".png", ".pdf", ".svg", ".gif", ".mp4")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="scoresolve")
def main() -> None:
    """Samples, likelihoods and proofs for score models.

    \b
    scoresolve demo                                  the main job, on real digits
    scoresolve sample --target ring --count 500      samples of a known distribution
    scoresolve certify dpmpp_2m                      what a solver does, measured exactly
    """


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
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


def _process(name: str, options: tuple[str, ...]) -> GaussianSDE:
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


def _target(name: str) -> GaussianMixture:
    import scoresolve as ss

    return ss.targets.ring() if name == "ring" else ss.targets.random_mixture(16, 10, seed=0)


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
    sde = _process(process or ("edm" if denoiser else "vp"), process_options)
    if target is not None:
        mixture = _target(target)
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
    if denoiser:
        return ss.from_denoiser(net, sde if isinstance(sde, ss.EDM) else None), sde, None
    return NetworkModel(net, sde, prediction or "score"), sde, None


def _target(name: str) -> GaussianMixture:
    from scoresolve.targets import random_mixture, ring

    return ring() if name == "ring" else random_mixture(16, 10, seed=0)


def _save(path: Path, arrays: dict[str, Tensor]) -> None:
    if path.suffix == ".npz":
        import numpy as np

        stored: dict[str, Any] = {name: value.cpu().numpy() for name, value in arrays.items()}
        np.savez(path, **stored)
    else:
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in arrays.items()}, path)


def _read(path: Path) -> Tensor:
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


def _device(name: str | None) -> torch.device | None:
    import torch

    if name is None:
        return None
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise click.BadParameter(f"--device {name} cannot be used here: {reason}") from None


def _leave(status: Tensor) -> None:
    """Exit unless every sample is good: with 130 if a keyboard interrupt is why, else with 1."""
    from scoresolve.errors import Status

    if bool((status == int(Status.INTERRUPTED)).any()):
        raise KeyboardInterrupt
    if bool((status != int(Status.OK)).any()):
        raise SystemExit(1)


def _sizes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise click.BadParameter(f"--shape {text}: give whole numbers, as 64,3,32,32") from None


@main.command()
@_model_options
@click.option("--shape", metavar="B,...", help="Shape of the batch, as 64,3,32,32; or")
@click.option("--count", type=int, help="number of samples, where one sample's shape is known.")
@click.option("--solver", help="A name that `scoresolve solvers` lists.")
@click.option("--steps", type=int, help="Steps of the grid; or")
@click.option("--nfe", type=int, help="at most so many network calls.")
@click.option("--grid", help="A named grid.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--chunk", type=int, help="Samples to work on at a time.")
@click.option("--denoise", is_flag=True, help="End with a call that jumps to sigma = 0.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32")
@click.option("--device", help="As torch names it, e.g. cuda.")
@click.option("--out", type=ARRAYS, default="samples.safetensors", show_default=True)
@click.option("--png", type=PICTURE, help="Also draw them: images, or points in the plane.")
def sample(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    event: tuple[int, ...] | None,
    out: Path,
    dtype: str,
    denoise: bool,
    shape: str | None = None,
    count: int | None = None,
    device: str | None = None,
    png: Path | None = None,
    **options: Any,
) -> None:
    """Draw samples and save them.

    \b
    scoresolve sample --target ring --count 500 --nfe 20 --png ring.png
    scoresolve sample --model nets:score --shape 64,3,32,32 --solver heun --steps 20
    """
    import torch

    import scoresolve as ss

    sizes = _sizes(shape)
    if (sizes is None) == (count is None):
        raise click.UsageError("give --shape or --count")
    if sizes is None:
        if event is None:
            raise click.UsageError("--count does not tell the shape of a sample: give --shape")
        sizes = (count or 0, *event)
    images = len(sizes) == 4 and sizes[1] in (1, 3)
    if png is not None and not images and sizes[1:] != (2,):
        raise click.UsageError(f"--png draws images or points in the plane, not {sizes[1:]}")
    found = ss.sample(
        score,
        sde,
        shape=sizes,
        denoise=denoise or None,
        dtype=getattr(torch, dtype),
        device=_device(device),
        progress=True,
        **options,
    )
    _save(out, {"x": found.x, "status": found.status})
    if png is not None:
        from scoresolve.plot import plot_images, plot_samples

        draw = plot_images if images else plot_samples
        draw({f"{len(found.x)} samples, {found.nfe} calls": found.x}).savefig(
            png, bbox_inches="tight"
        )
    good = int(found.ok.sum())
    click.echo(f"{good} of {len(found.x)} samples good, {found.nfe} network calls, in {out}")
    _leave(found.status)


@main.command()
@_model_options
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="An array [N, ...].")
@click.option("--count", type=click.IntRange(min=1), help="Take the first so many.")
@click.option("--solver", default="auto", show_default=True)
@click.option("--cost", type=int, help="Evaluations and products per sample, for auto; 200.")
@click.option("--nfe", type=int, help="Network calls.")
@click.option("--trace", type=click.Choice(["auto", "exact", "hutchinson"]), default="auto")
@click.option("--probes", type=int, help="Random probes a call, on average.")
@click.option("--dequantise", type=float, help="Width of the bins of discrete data.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--chunk", type=int, help="Samples to work on at a time.")
@click.option("--out", type=ARRAYS, help="Save log-densities and latents.")
def likelihood(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    event: tuple[int, ...] | None,
    data: Path | None = None,
    count: int | None = None,
    out: Path | None = None,
    **options: Any,
) -> None:
    """Log-likelihood of data under a model; with --digits and no --data, of held-out digits.

    \b
    scoresolve likelihood --target ring --data ring.npz
    scoresolve likelihood --digits --count 100
    scoresolve likelihood --digits --count 10 --trace exact --nfe 64
    """
    import scoresolve as ss

    if data is not None:
        x = _read(data)
    elif event == (1, 8, 8):
        from scoresolve.digits import BIN_WIDTH, load_digits, to_unit

        x = to_unit(load_digits("test").levels, 0.0)
        options["dequantise"] = BIN_WIDTH
    else:
        raise click.UsageError("give --data")
    found = ss.log_likelihood(score, sde, x[:count], progress=True, **options)
    if out is not None:
        names = ("log_prob", "standard_error", "latent", "status")
        _save(out, {name: getattr(found, name) for name in names})
    good = found.ok
    click.echo(f"log-likelihood: {_mean(found.log_prob[good])} nats")
    click.echo(f"bits: {_mean(found.bits_per_dim[good])} bits/dim")
    cost = float(found.cost[good].mean())
    click.echo(f"{int(good.sum())} of {len(good)} good, {cost:.0f} evaluations each")
    _leave(found.status)


def _mean(values: Tensor) -> str:
    """The mean, and its standard error where there are two values to tell it from."""
    if len(values) < 2:
        return f"{float(values.mean()):.4f}"
    return f"{float(values.mean()):.4f} +- {float(values.std()) / len(values) ** 0.5:.4f}"


@main.command()
@_model_options
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="An array [N, ...].")
@click.option("--count", type=click.IntRange(min=1), help="Take the first so many.")
@click.option("--levels", type=click.IntRange(min=1), help="Noise levels.  [8]")
@click.option("--points", type=click.IntRange(min=2), help="Points to take all derivatives at.")
@click.option("--probes", type=click.IntRange(min=2), help="Random vectors per point and level.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--png", type=PICTURE, help="Also draw it.")
def verify(
    score: Model | Callable[..., Tensor],
    sde: GaussianSDE,
    event: tuple[int, ...] | None,
    as_json: bool,
    data: Path | None = None,
    count: int | None = None,
    png: Path | None = None,
    **options: Any,
) -> None:
    """Measure how far a network is from a score field; exit code 1 if it is too far.

    With --digits and no --data on held-out digits; with --target on samples of it.

    \b
    scoresolve verify --target ring
    scoresolve verify --digits --png digits.png
    scoresolve verify --model nets:eps --prediction eps --data held_out.npy --json
    """
    import torch

    import scoresolve as ss

    target = click.get_current_context().params["target"]
    law = None if target is None else _target(target)
    if data is not None:
        x = _read(data)
    elif law is not None:
        x = law.sample(count or 512, seed=1)
    elif event == (1, 8, 8):
        from scoresolve.digits import load_digits, to_unit
        from scoresolve.noise import Purpose

        levels = load_digits("test").levels
        like = torch.empty(levels.shape)
        x = to_unit(levels, ss.Philox(options["seed"]).uniform(like, 0, Purpose.DEQUANTISE))
    else:
        raise click.UsageError("give --data")
    found = ss.verify_model(score, sde, x[:count], law=law, **options)
    if png is not None:
        from scoresolve.plot import plot_verification

        plot_verification({f"{len(x[:count])} points": found}).savefig(png, bbox_inches="tight")
    click.echo(found.to_json() if as_json else str(found))
    if not found.ok:
        raise SystemExit(1)


@main.command()
@click.argument("solvers", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every solver of the registry.")
@click.option("--sde", "process", type=click.Choice(list(PROCESSES)), default="vp")
@click.option("--sde-option", "process_options", multiple=True, metavar="KEY=NUMBER")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--page", type=PAGE, help="Also write a page with pictures.")
def certify(
    solvers: tuple[str, ...],
    everything: bool,
    process: str,
    process_options: tuple[str, ...],
    as_json: bool,
    page: Path | None,
) -> None:
    """Measure SOLVERS on data whose answer is known; exit code 1 if a claim fails.

    \b
    scoresolve certify dpmpp_2m ab3_v
    """
    from tqdm import tqdm

    import scoresolve as ss
    from scoresolve.solvers import REGISTRY, get_solver

    if everything == bool(solvers):
        raise click.UsageError("name at least one solver, or give --all")
    names = [*REGISTRY] if everything else solvers
    for name in names:
        get_solver(name)
    sde = _process(process, process_options)
    certificates = [ss.certify(name, sde) for name in tqdm(names, disable=None, unit="solver")]
    if as_json:
        click.echo(json.dumps([json.loads(c.to_json()) for c in certificates], indent=2))
    else:
        click.echo("\n\n".join(map(str, certificates)))
    if page is not None:
        from scoresolve.audits import certificate_page

        page.write_text(certificate_page(certificates), encoding="utf-8")
    if not all(certificate.passed for certificate in certificates):
        raise SystemExit(1)


@main.command()
@click.argument("libraries", nargs=-1, required=True)
@click.option("--only", multiple=True, metavar="REGEX", help="Samplers with such a name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option("--out", type=REPORT, help="Also write the report, as .md, .html or .json.")
def audit(
    libraries: tuple[str, ...], only: tuple[str, ...], as_json: bool, out: Path | None
) -> None:
    """Certify every sampler of installed LIBRARIES; exit code 1 if a claim fails.

    \b
    scoresolve audit k-diffusion
    scoresolve audit diffusers --only ddim --out ddim.html
    """
    import scoresolve as ss
    from scoresolve.audits import audit_page, pages

    audits = [ss.audit(library, only=only, progress=True) for library in libraries]
    text = "[" + ",\n".join(found.to_json() for found in audits) + "]"
    click.echo(text if as_json else "\n\n".join(map(str, audits)))
    if out is not None:
        write = {".md": lambda: pages(audits), ".html": lambda: audit_page(audits)}
        out.write_text(write.get(out.suffix, lambda: text)(), encoding="utf-8")
    if not all(found.passed for found in audits):
        raise SystemExit(1)


@main.command()
@click.argument("samples", type=click.Path(exists=True, path_type=Path))
@click.option("--target", type=click.Choice(TARGETS), help="The mixture they should be from; or")
@click.option(
    "--reference", type=click.Path(exists=True, path_type=Path), help="a file of other samples."
)
@click.option(
    "--sde",
    "process",
    type=click.Choice(list(PROCESSES)),
    help="Take the target's law at t_min of this process, where `sample` ends.",
)
@click.option("--sde-option", "process_options", multiple=True, metavar="KEY=NUMBER")
@click.option("--distance", "chosen", multiple=True, help="Only this one; may be repeated.")
@click.option("--draws", type=int, help="Draws of every noise floor, at least 19.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def distances(
    samples: Path,
    target: str | None,
    reference: Path | None,
    process: str | None,
    process_options: tuple[str, ...],
    chosen: tuple[str, ...],
    draws: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """How far SAMPLES, a file, are from a law, each distance beside its noise floor.

    \b
    scoresolve distances samples.safetensors --target ring --sde vp
    """
    import scoresolve as ss

    if (target is None) == (reference is None):
        raise click.UsageError("give --target or --reference")
    if process is not None and target is None:
        raise click.UsageError("--sde is the process of a --target: leave it out")
    against = _read(reference) if reference is not None else _target(str(target))
    if process is not None and isinstance(against, ss.GaussianMixture):
        sde = _process(process, process_options)
        against = against.marginal(sde, sde.t_min)
    table = ss.compare_samples(_read(samples), against, chosen or None, draws=draws, seed=seed)
    click.echo(table.to_json() if as_json else str(table))


@main.command()
@click.argument("name", required=False)
@click.option("--out", type=MOVING, help="Where to write it [NAME.png]; some move as .gif or .mp4.")
@click.option("--list", "listed", is_flag=True, help="List the pictures.")
def plot(name: str | None, out: Path | None, listed: bool) -> None:
    """Draw the picture NAME.

    \b
    scoresolve plot --list
    scoresolve plot orders --out orders.png
    scoresolve plot flow --out flow.gif
    """
    from scoresolve.plot import PICTURES, save_picture

    if listed:
        for known, each in PICTURES.items():
            click.echo(f"{known:10s} {each.text}")
        return
    if name is None:
        raise click.UsageError("name a picture; --list shows them")
    path = out or Path(f"{name}.png")
    save_picture(name, path)
    click.echo(f"{name} drawn in {path}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def solvers(as_json: bool) -> None:
    """List every solver: order, network calls for n steps, source.

    \b
    scoresolve solvers --json
    """
    from scoresolve.solvers import REGISTRY, get_solver, nfe_rule

    rows = []
    for name in REGISTRY:
        solver = get_solver(name)
        rows.append(
            {
                "name": name,
                "order": solver.order,
                "calls": nfe_rule(solver),
                "kind": "SDE" if solver.stochastic else "ODE",
                "source": solver.source,
            }
        )
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    shown = [{key: "-" if v is None else str(v) for key, v in row.items()} for row in rows]
    table = [{key: key for key in rows[0]}, *shown]
    widths = {key: max(len(row[key]) for row in table) for key in table[0]}
    for row in table:
        line = "  ".join(cell.ljust(widths[key]) for key, cell in row.items())
        click.echo(line.rstrip())


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("scoresolve-demo"))
@click.option("--seed", type=int, default=0, show_default=True)
def demo(out: Path, seed: int) -> None:
    """The main job on real data: draw digits, state bits per dimension, compare solvers.

    Writes pictures, figures as JSON and one report page into the folder --out.

    \b
    scoresolve demo --out my-report
    """
    import torch

    from scoresolve.demo import DemoSettings, run_demo

    torch.set_num_threads(1)  # the network is so small that a second thread only waits
    report = run_demo(out, DemoSettings(seed=seed))
    click.echo(report.summary())


if __name__ == "__main__":
    main()
