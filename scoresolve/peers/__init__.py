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

from scoresolve.peers import from_azula, from_diffusers, from_k_diffusion
from scoresolve.peers.base import LIBRARIES, Noise, Peer, installed, versions
from scoresolve.peers.black_box import BlackBox
from scoresolve.peers.from_diffusers import quiet_scheduler
from scoresolve.peers.from_k_diffusion import k_sampling

__all__ = [
    "LIBRARIES",
    "PEERS",
    "BlackBox",
    "Noise",
    "Peer",
    "installed",
    "k_sampling",
    "quiet_scheduler",
    "versions",
]

PEERS: dict[str, Peer] = {
    f"{peer.library} {peer.name}": peer
    for module in (from_diffusers, from_k_diffusion, from_azula)
    for peer in module.peers()
}
"""Every peer by library and name."""
