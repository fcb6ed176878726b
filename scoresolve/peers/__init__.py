"""Other libraries' samplers on our model, our time grid, our starts and our noise.

With k = sigma/alpha every Gaussian process is x = alpha x', x' = x0 + k eps, and in unit length
x = r u with r = sqrt(alpha^2 + sigma^2). The three conventions in use are then one change of scale:

    k-diffusion   x' at noise level k, model = E[x0 | x']
    diffusers     u at cumulative alphas 1/(1 + k^2), model = eps or v
    azula         x itself, alpha and sigma as a schedule, model = E[x0 | x]

A peer gets float64 throughout, also where it would cast to float32, so that what differs is the
method. Each stops at the last time of the grid: no peer jumps to sigma = 0.
"""

from __future__ import annotations

from scoresolve.errors import ArgumentError, known_name
from scoresolve.peers import (
    from_azula,
    from_diffusers,
    from_k_diffusion,
    shipped_diffusers,
    shipped_k_diffusion,
    shipped_ode,
)
from scoresolve.peers.base import LIBRARIES, Noise, Peer, installed, versions
from scoresolve.peers.black_box import BadOutput, BlackBox, Normals, refined
from scoresolve.peers.from_diffusers import quiet_scheduler
from scoresolve.peers.from_k_diffusion import k_sampling
from scoresolve.peers.shipped_diffusers import diffusers_scheduler
from scoresolve.peers.shipped_k_diffusion import (
    azula_sampler,
    edm_sampler,
    k_diffusion_function,
)
from scoresolve.peers.shipped_ode import (
    flow_matching_solver,
    scipy_solver,
    torchdiffeq_solver,
    torchode_solver,
    torchsde_solver,
)

__all__ = [
    "LIBRARIES",
    "PEERS",
    "BadOutput",
    "BlackBox",
    "Noise",
    "Normals",
    "Peer",
    "azula_sampler",
    "boxes",
    "diffusers_scheduler",
    "edm_sampler",
    "flow_matching_solver",
    "installed",
    "k_diffusion_function",
    "k_sampling",
    "quiet_scheduler",
    "refined",
    "scipy_solver",
    "torchdiffeq_solver",
    "torchode_solver",
    "torchsde_solver",
    "versions",
]

PEERS: dict[str, Peer] = {
    f"{peer.library} {peer.name}": peer
    for module in (from_diffusers, from_k_diffusion, from_azula)
    for peer in module.peers()
}
"""Every peer by library and name."""


def boxes(library: str) -> dict[str, BlackBox]:
    """The samplers of an installed library as black boxes, by name.

    Those that run on any grid come first, then those that run as their users run them, whose
    names end in ", as shipped".

    Args:
        library: one of `LIBRARIES`.

    Raises:
        UnknownNameError: no such library.
        ArgumentError: it is not installed.
    """
    known_name("library", library, LIBRARIES)
    if not installed(library):
        raise ArgumentError(f"{library} is not installed: pip install {library}")
    gridded = [peer.box for peer in PEERS.values() if peer.library == library]
    shipped = {
        "diffusers": shipped_diffusers.boxes,
        "k-diffusion": shipped_k_diffusion.k_boxes,
        "azula": shipped_k_diffusion.azula_boxes,
        **shipped_ode.BOXES,
    }[library]()
    return {box.name: box for box in gridded} | {f"{box.name}, as shipped": box for box in shipped}
