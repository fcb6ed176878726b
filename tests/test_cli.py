"""The command line does what the verbs do, and fails in one line."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import scoresolve as ss
from scoresolve.cli import main
from scoresolve.digits import BIN_WIDTH, load_digits, load_network, to_unit
from scoresolve.solvers import REGISTRY


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_every_command_has_help_with_an_example() -> None:
    assert "scoresolve demo" in run("--help").output
    for name in main.commands:
        result = run(name, "--help")
        assert result.exit_code == 0
        assert f"scoresolve {name}" in result.output


def test_samples_are_those_of_the_verb(folder: Path) -> None:
    result = run("sample", "--target", "ring", "--count", "5", "--nfe", "8", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert "5 of 5 samples good, 8 network calls" in result.output
    sde = ss.VP()
    expected = ss.sample(ss.targets.ring().score_model(sde), sde, shape=(5, 2), nfe=8, seed=3).x
    stored = load_file(folder / "samples.safetensors")
    assert torch.equal(stored["x"], expected)
    assert stored["status"].tolist() == [0] * 5


def test_digits_are_drawn_and_pictured(folder: Path) -> None:
    result = run(
        *("sample", "--digits", "--count", "4", "--nfe", "5", "--solver", "heun"),
        *("--grid", "karras", "--out", "d.npz", "--png", "d.png"),
    )
    assert result.exit_code == 0, result.output
    with np.load(folder / "d.npz") as stored:
        assert stored["x"].shape == (4, 1, 8, 8)
    assert (folder / "d.png").stat().st_size > 1000


def test_an_own_model_is_read_as_it_is_declared(folder: Path) -> None:
    (folder / "nets.py").write_text(
        "import scoresolve as ss\n"
        "exact = ss.targets.ring().score_model(ss.VP())\n"
        "def eps(x, t): return exact.predict('eps', x, t)\n"
    )
    arguments = ("sample", "--shape", "6,2", "--nfe", "6", "--solver", "ddim")
    for out, model in (
        ("a.npz", ("--model", "nets:eps", "--prediction", "eps")),
        ("b.npz", ("--model", "nets:exact")),
        ("c.npz", ("--target", "ring")),
    ):
        result = run(*arguments, *model, "--out", out)
        assert result.exit_code == 0, result.output
    a, b, c = (np.load(folder / name)["x"] for name in ("a.npz", "b.npz", "c.npz"))
    np.testing.assert_allclose(a, c, atol=1e-5)
    np.testing.assert_array_equal(b, c)


def test_a_failed_sample_gives_exit_code_1(folder: Path) -> None:
    (folder / "bad.py").write_text("def score(x, t): return x * float('nan')\n")
    result = run("sample", "--model", "bad:score", "--shape", "2,2", "--nfe", "2")
    assert result.exit_code == 1
    assert "0 of 2 samples good" in result.output


def test_likelihood_is_that_of_the_verb(folder: Path) -> None:
    x = ss.targets.ring().sample(4)
    np.save(folder / "x.npy", x.numpy())
    result = run("likelihood", "--target", "ring", "--data", "x.npy", "--out", "l.npz")
    assert result.exit_code == 0, result.output
    with np.load(folder / "l.npz") as stored:
        found = torch.from_numpy(stored["log_prob"])
    sde = ss.VP()
    expected = ss.log_likelihood(ss.targets.ring().score_model(sde), sde, x)
    torch.testing.assert_close(found, expected.log_prob)
    assert f"log-likelihood: {float(expected.log_prob.mean()):.4f}" in result.output


def test_likelihood_of_held_out_digits_is_dequantised() -> None:
    options = ("--count", "2", "--solver", "rk4_flow", "--nfe", "16", "--trace", "hutchinson")
    result = run("likelihood", "--digits", *options)
    assert result.exit_code == 0, result.output
    expected = ss.log_likelihood(
        ss.from_denoiser(load_network()),
        ss.EDM(),
        to_unit(load_digits("test").levels[:2], 0.0),
        solver="rk4_flow",
        nfe=16,
        trace="hutchinson",
        dequantise=BIN_WIDTH,
    )
    assert f"bits: {float(expected.bits_per_dim.mean()):.4f}" in result.output


def test_verify_is_that_of_the_verb_and_tells_pass_from_fail(folder: Path) -> None:
    asked = ("--count", "64", "--levels", "2", "--points", "8")
    result = run("verify", "--target", "ring", *asked, "--json", "--png", "v.png")
    assert result.exit_code == 0, result.output
    law, sde = ss.targets.ring(), ss.VP()
    x = law.sample(64, seed=1)
    expected = ss.verify_model(law.score_model(sde), sde, x, law=law, levels=2, points=8)
    assert json.loads(result.output) == json.loads(expected.to_json())
    assert (folder / "v.png").stat().st_size > 1000
    np.save(folder / "x.npy", x.numpy())
    (folder / "bad.py").write_text(
        "import scoresolve as ss\n"
        "exact = ss.targets.ring().score_model(ss.VP())\n"
        "def score(x, t): return 1.3 * exact(x, t)\n"
    )
    result = run("verify", "--model", "bad:score", "--data", "x.npy", *asked)
    assert result.exit_code == 1
    assert "[FAILED] denoising" in result.output


def test_verify_takes_held_out_digits() -> None:
    result = run("verify", "--digits", "--count", "16", "--levels", "1", "--points", "2")
    assert result.exit_code in (0, 1), result.output
    assert "16 points, derivatives at 2 (8 probes)" in result.output


def test_certify_tells_pass_from_fail_by_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("certify", "ddim", "--json")
    assert result.exit_code == 0
    (certificate,) = json.loads(result.output)
    assert certificate["solver"] == "ddim"
    assert certificate["passed"] is True
    assert [world["process"].partition("(")[0] for world in certificate["worlds"]] == [
        "VP",
        "RectifiedFlow",
    ]
    (alone,) = json.loads(run("certify", "ddim", "--sde", "edm", "--json").output)
    assert alone["process"] == repr(ss.EDM())

    class Proud(ss.solvers.DPMSolverPP):
        def __init__(self) -> None:
            super().__init__()
            self.order = 3

    monkeypatch.setitem(REGISTRY, "dpmpp_2m", Proud)
    result = run("certify", "dpmpp_2m")
    assert result.exit_code == 1
    assert "FAILED" in result.output


def test_distances_are_those_of_the_verb(folder: Path) -> None:
    ring = ss.targets.ring()
    x = ring.sample(40) + 0.3
    np.savez(folder / "x.npz", x=x.numpy())
    options = ("--distance", "ks", "--distance", "log_density", "--draws", "19")
    result = run("distances", "x.npz", "--target", "ring", "--seed", "2", *options)
    assert result.exit_code == 0, result.output
    expected = ss.compare_samples(x, ring, ("ks", "log_density"), draws=19, seed=2)
    assert result.output == f"{expected}\n"
    rows = json.loads(
        run("distances", "x.npz", "--target", "ring", "--sde", "vp", "--json", *options).output
    )["distances"]
    law = ring.marginal(ss.VP(), ss.VP().t_min)
    expected = ss.compare_samples(x, law, ("ks", "log_density"), draws=19)
    assert [row["value"] for row in rows] == [each.value for each in expected.distances]
    same = run("distances", "x.npz", "--reference", "x.npz", "--distance", "ks")
    assert same.exit_code == 0 and "within noise" in same.output


def test_solvers_lists_the_registry() -> None:
    table = run("solvers").output
    rows = json.loads(run("solvers", "--json").output)
    assert [row["name"] for row in rows] == list(REGISTRY)
    assert all(name in table for name in REGISTRY)
    assert all(row["source"] for row in rows)
    calls = {row["name"]: row["calls"] for row in rows}
    assert (calls["ddim"], calls["heun"], calls["ab3"]) == ("n", "2n", "n + 1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("certify", "dpmpp2m"), "dpmpp_2m"),
        (("certify",), "name at least one solver"),
        (("certify", "ddim", "--sde-option", "t_min=0.01"), "give --sde"),
        (("distances", __file__, "--target", "ring", "--sde-option", "T=2"), "give --sde"),
        (("sample", "--target", "ring"), "--shape or --count"),
        (("sample", "--count", "2"), "one of --model"),
        (("sample", "--model", "nowhere:f", "--shape", "2,2"), "nowhere"),
        (("sample", "--target", "ring", "--shape", "two"), "whole numbers"),
        (("sample", "--target", "ring", "--count", "2", "--sde-option", "T=x"), "KEY=NUMBER"),
        (("sample", "--target", "ring", "--count", "2", "--sde-option", "q=1"), "no such option"),
        (("sample", "--target", "ring", "--count", "2", "--grid", "kar"), "karras"),
        (("sample", "--target", "ring", "--count", "2", "--out", "x.txt"), ".safetensors or .npz"),
        (("likelihood", "--target", "ring"), "give --data"),
        (("verify", "--model", "scoresolve.cli:main"), "give --data"),
        (("verify", "--model", "operator:neg", "--data", __file__), "net(x, t)"),
        (("sample", "--model", "operator:setitem", "--shape", "2,2"), "net(x, t)"),
        (("audit", "scipy", "--only", "("), "no regular expressions"),
        (("audit", "scipy", "nowhere"), "unknown library"),
        (("plot", "nothing"), "unknown picture"),
        (("plot",), "name a picture"),
        (("distances", __file__, "--target", "ring"), ".npz or .npy"),
        (("distances", __file__), "--target or --reference"),
        (("distances", __file__, "--reference", __file__, "--sde", "vp"), "leave it out"),
    ],
)
def test_a_wrong_call_gets_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_an_interrupt_gives_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ss, "sample", interrupted)
    assert run("sample", "--target", "ring", "--count", "2").exit_code == 130


def test_an_interrupted_list_of_certificates_shows_those_that_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    certify = ss.certify

    def stopped(name: str, *values: object) -> ss.Certificate:
        if name == "heun":
            raise KeyboardInterrupt
        return certify(name, *values)

    monkeypatch.setattr(ss, "certify", stopped)
    result = run("certify", "ddim", "heun", "--json")
    assert result.exit_code == 130
    assert [each["solver"] for each in json.loads(result.stdout)] == ["ddim"]


OWN = """
import torch
def lost(x, t):
    raise KeyError("lost")
def late(x, t):
    if t.flatten()[0] < 0.5: raise ValueError("too late")
    return -x
def leaves(x, t): raise SystemExit(0)
def memory(x, t): raise MemoryError("no more")
class Net(torch.nn.Module):
    def forward(self, x, t): return 1 / 0
net = Net()
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lost", "the model own_nets:lost raised KeyError: 'lost', in its call 1, at t = 1;"),
        ("late", "raised ValueError: too late, in its call 4, at t = 0.25"),
        ("leaves", "raised SystemExit: 0, in its call 1"),
        ("net", "raised ZeroDivisionError: division by zero, in its call 1"),
        ("memory", "out of memory"),
    ],
)
def test_a_model_that_raises_is_told_with_its_call_and_time(
    name: str, words: str, folder: Path
) -> None:
    (folder / "own_nets.py").write_text(OWN)
    call = ("sample", "--model", f"own_nets:{name}", "--shape", "2,2", "--steps", "4")
    result = run(*call, "--solver", "ddim", "--grid", "uniform")
    assert (result.exit_code, len(result.stderr.splitlines())) == (3, 1)
    assert words in result.stderr
    assert "Traceback" in run(*call, "--traceback").stderr


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (".own:net", "give the module's whole name, own:net"),
        ("sub/own.py:net", "as sub.own:net"),
        ("raises:net", "importing raises raised ZeroDivisionError"),
        ("exits:net", "importing exits raised SystemExit: 7"),
        ("needs:net", "No module named 'not_installed'"),
        ("sub:net", "folder without __init__.py"),
        ("good:nett", "did you mean net, Net?"),
        ("good:Net", "is a class: name an object"),
        ("good", "give MODULE:NAME"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_in_words(
    reference: str, words: str, folder: Path
) -> None:
    (folder / "sub").mkdir()
    (folder / "raises.py").write_text("1 / 0")
    (folder / "exits.py").write_text("raise SystemExit(7)")
    (folder / "needs.py").write_text("import not_installed")
    (folder / "good.py").write_text("class Net: ...\ndef net(x, t): return -x\n")
    result = run("sample", "--model", reference, "--shape", "2,2")
    assert result.exit_code == 2
    assert words in result.output


def test_a_file_is_replaced_only_when_told(folder: Path) -> None:
    call = ("sample", "--target", "ring", "--count", "2", "--nfe", "4", "--out", "x.npz")
    (folder / "x.npz").write_text("dear")
    result = run(*call)
    assert (result.exit_code, (folder / "x.npz").read_text()) == (2, "dear")
    assert "x.npz exists: give --overwrite" in result.output
    assert run(*call, "--overwrite").exit_code == 0
    assert np.load(folder / "x.npz")["x"].shape == (2, 2)
    (folder / "scoresolve-demo").mkdir()
    (folder / "scoresolve-demo" / "report.html").write_text("dear")
    assert "holds report.html: give --overwrite" in run("demo").output
    (folder / "grids.png").write_text("dear")
    assert "grids.png exists" in run("plot", "grids").output


def test_a_disk_that_is_full_leaves_the_old_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    (folder / "x.npz").write_text("dear")
    call = ("sample", "--target", "ring", "--count", "2", "--nfe", "4", "--out", "x.npz")
    result = run(*call, "--overwrite")
    assert result.exit_code == 3
    assert "scoresolve: x.npz: No space left on device\n" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["x.npz"]
    assert (folder / "x.npz").read_text() == "dear"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_does_not_arrive_is_an_error() -> None:
    call = [sys.executable, "-m", "scoresolve.cli", "plot", "--list"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 3
    assert ended.stderr == "scoresolve: the output: No space left on device\n"


def test_output_that_nobody_reads_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("click.echo", closed)
    result = run("plot", "--list")
    assert (result.exit_code, result.stderr) == (141, "")


def test_files_that_hold_something_else_are_refused(folder: Path) -> None:
    np.save(folder / "one.npy", np.array(1.0))
    np.savez(folder / "none.npz")
    (folder / "junk.safetensors").write_text("junk")
    for call, words in (
        (("likelihood", "--target", "ring", "--data", "one.npy"), "holds one number"),
        (("likelihood", "--target", "ring", "--data", "none.npz"), "holds nothing"),
        (("sample", "--weights", "junk.safetensors", "--count", "2"), "cannot be read as weights"),
    ):
        result = run(*call)
        assert result.exit_code == 2
        assert words in result.output
