"""Why samplers of other libraries fail their checks, where somebody has read the code."""

from __future__ import annotations

import re

__all__ = ["cause_of"]

_CAUSES: tuple[tuple[str, str, str, str], ...] = (
    # library, name of the sampler, claim of the check, cause
    (
        "azula",
        r"REAB[234]",
        r"order",
        "sigma of the time it comes from stands where that of the time it goes to belongs",
    ),
    (
        "azula",
        r"[vzx]E?AB[34]",
        r"order",
        "the first steps have lower order, and nothing makes up for their error",
    ),
    (
        "azula",
        r"ddim.*",
        r"draws no",
        "noise is drawn and multiplied by 0 when eta is 0",
    ),
    (
        "diffusers",
        r"flow_match_euler\(stochastic\).*",
        r"order|no refinement|keeps the variance",
        "x0 and fresh noise are mixed at the next level with the weights of the deterministic path "
        "although x0 is a mean, so that the variance of x0 given x is lost at every step",
    ),
    (
        "diffusers",
        r"plms, as shipped",
        r"order|keeps the variance",
        "by default (`set_alpha_to_one=False`) the last step goes to the first level of the chain "
        "instead of to clean data, so that the noise of that level is left",
    ),
    (
        "diffusers",
        r"lcm",
        r"keeps the variance",
        "fresh noise is added to the predicted x0, which is a mean unless the network is a "
        "consistency model, so that the variance of x0 given x is lost at every step",
    ),
    (
        "diffusers",
        r"ddim\((linspace|trailing)\).*",
        r"order|no refinement",
        "`step` takes timestep - 1000 // n for the next one, whatever the spacing of the timesteps",
    ),
    (
        "diffusers",
        r"(sde-)?dpmsolver.*|deis.*|unipc.*",
        r"order \d of its last jump",
        "the timesteps leave out 0: the last is about 1000/(n + 1), and from there it jumps to "
        "sigma = 0 in one step",
    ),
    (
        "diffusers",
        r"dpmsolver(\+\+)? 3S",
        r"order|no refinement",
        "where n is not a multiple of 3 it ends on a step of order 1 or 2 as long as the others",
    ),
    (
        "diffusers",
        r"sde-dpmsolver\+\+ 3M.*",
        r"order|no refinement",
        "the coefficients of the third-order update are those of the deterministic solver",
    ),
    (
        "diffusers",
        r"deis3.*",
        r"no refinement",
        "integrals of Lagrange polynomials are differences of nearly equal float32 numbers",
    ),
    (
        "diffusers",
        r"unipc2\(bh1\).*",
        r".*finite.*|order.*|keeps.*",
        "at sigma = 0 the step h is infinite and bh1 divides by it",
    ),
    (
        "diffusers",
        r"(dpmsolver(\+\+)? [23]M|unipc|deis).*",
        r"order \d of the",
        "the first steps have lower order, and with `lower_order_final` the last ones too",
    ),
    (
        "diffusers",
        r"(lms4|ipndm|pndm).*",
        r"order",
        "the first steps have lower order, and nothing makes up for their error",
    ),
    (
        "diffusers",
        r"sde_ve.*",
        r"keeps (samples|a NaN)",
        "the corrector's step size is made of norms averaged over the batch",
    ),
    (
        "k-diffusion",
        r"dpmpp_sde",
        r"order",
        "both stages of a step draw noise of their own, where they need one Brownian path",
    ),
    (
        "k-diffusion",
        r"dpmpp_3m_sde.*",
        r"order",
        "its first steps have lower order, and the noise is that of order 2",
    ),
    (
        "k-diffusion",
        r"dpm_fast",
        r"order|no refinement",
        "where n = 1 modulo 3 it ends on a step of order 1 as long as the others",
    ),
    (
        "k-diffusion",
        r"lms[34]",
        r"order",
        "the first steps have lower order, and nothing makes up for their error",
    ),
    (
        "k-diffusion",
        r"(euler|heun|dpm_2)(, as shipped)?",
        r"draws no",
        "noise is drawn for the churn also where the churn is 0",
    ),
    (
        "k-diffusion",
        r"(dpmpp_|dpm_fast|dpm_adaptive).*",
        r"draws no",
        "noise is drawn and multiplied by 0 when eta is 0",
    ),
    (
        "k-diffusion",
        r"dpm_adaptive.*",
        r"keeps a NaN",
        "an error that is not a number is not below 1, so the step is tried again for ever",
    ),
    (
        "k-diffusion",
        r"dpm_adaptive.*",
        r"keeps samples apart",
        "all samples have one step size",
    ),
    (
        "scipy",
        r".*",
        r"keeps a NaN",
        "an error norm that is not a number is not below 1, so the step is tried again for ever",
    ),
    (
        "scipy",
        r".*",
        r"keeps samples apart",
        "all samples are one vector with one step size",
    ),
    (
        "torchdiffeq",
        r"dopri5.*",
        r"stays inside|runs",
        "the last step goes beyond the end and is interpolated back",
    ),
    (
        "torchdiffeq",
        r"dopri5.*",
        r"keeps (samples|a NaN)",
        "all samples have one step size",
    ),
    (
        "torchode",
        r".*",
        r"keeps a NaN",
        "one row that is not a number ends the loop for all, and unset memory is handed out",
    ),
    (
        r"diffusers|k-diffusion",
        r".*, as shipped",
        r"keeps the variance",
        "the last step jumps to sigma = 0 by the predicted x0, a mean: v becomes v^2/(v + sigma^2)",
    ),
    (
        r".*",
        r".*",
        r"gives the same sample in any batch",
        "noise is drawn for the batch as a whole, so a sample's numbers depend on its size",
    ),
    (
        r".*",
        r".*",
        r"refuses a model",
        "shapes are not compared, and [B, 1] is broadcast",
    ),
)


def cause_of(library: str, sampler: str, claim: str) -> str:
    """What is known of the cause; empty where nothing is."""
    for of_library, of_sampler, of_claim, cause in _CAUSES:
        if (
            re.fullmatch(of_library, library)
            and re.fullmatch(of_sampler, sampler)
            and re.match(of_claim, claim)
        ):
            return cause
    return ""
