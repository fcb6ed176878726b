"""Pictures of solvers, grids, flows and samples, each a `matplotlib.figure.Figure`, some moving.

What is drawn is computed, never sketched: orders from exact laws, densities in closed form,
trajectories by the solvers themselves. Lines carry their own labels.

    plot_orders([...]).savefig("orders.png")
    picture("orders").savefig("orders.png")        save_picture("flow", "flow.gif")
"""

from scoresolve.plot.chains import animate_chains, plot_chains, plot_diagnostics
from scoresolve.plot.convergence import (
    plot_certificate,
    plot_grids,
    plot_orders,
    plot_strong_errors,
)
from scoresolve.plot.flows import plot_brownian, plot_flow, plot_paths, plot_score
from scoresolve.plot.four_points import learn_four_points, plot_four_points
from scoresolve.plot.motion import animate_flow, animate_score
from scoresolve.plot.pictures import PICTURES, Picture, picture, save_picture
from scoresolve.plot.samples import plot_images, plot_samples
from scoresolve.plot.saving import save_figure, save_film
from scoresolve.plot.verification import plot_verification

__all__ = [
    "PICTURES",
    "Picture",
    "animate_chains",
    "animate_flow",
    "animate_score",
    "learn_four_points",
    "picture",
    "plot_brownian",
    "plot_certificate",
    "plot_chains",
    "plot_diagnostics",
    "plot_flow",
    "plot_four_points",
    "plot_grids",
    "plot_images",
    "plot_orders",
    "plot_paths",
    "plot_samples",
    "plot_score",
    "plot_strong_errors",
    "plot_verification",
    "save_figure",
    "save_film",
    "save_picture",
]
