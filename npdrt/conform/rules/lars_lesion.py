"""What the referee knows of Fromage without its prefactor, which the paper runs as an ablation."""

from __future__ import annotations

from typing import Any

from npdrt.conform.page import ROUND, Norms, Numbers, minus
from npdrt.conform.rules.fromage import CLAUSES, opposed, page_rate, step
from npdrt.conform.rules.rule import Dialect, Generated, Rule


# the section "lars_lesion" of docs/updates.md
def page(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None
) -> Numbers:
    """The sequence."""
    return minus(w, page_rate(w, g, lr, dtype, norms), g, ROUND[dtype])


RULE = Rule(
    name="lars_lesion",
    added=0,
    page=page,
    clauses={k: v for k, v in CLAUSES.items() if k not in ("norm bound", "state")},
    step=step,
    dialects=(Dialect("published", "Bernstein et al. 2020, Equation 5 and Figure 2 (right)", {}),),
    published={"prefactor": "absent"},
    ulps=10.0,
    asked=({},),
    edges=opposed,
    generated=(Generated({}),),
    ablation=True,
)
