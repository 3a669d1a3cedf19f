"""Who runs a chain: a table of ways to make a callable of a case's module.

In comes a case and its module, out comes a function of the case's arguments. Adding an opponent is
one entry; what it computes is checked like all others before it is timed.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fxfuse
from fxfuse.bench.chains import NORMS, Chain, attended
from fxfuse.bench.peers import PEERS, Peer
from fxfuse.bench.recipes import RECIPES, Case

Outputs = Tensor | tuple[Tensor, ...]
Run = Callable[..., Outputs]


@dataclasses.dataclass(frozen=True)
class Opponent:
    """One way to run a chain.

    devices    where it is run unless others are asked for
    package    what must be installed, None for torch alone
    recipes    recipes it knows, None for all
    in_place   it may overwrite its arguments
    """

    name: str
    build: Callable[[Case, Chain], Run]
    devices: tuple[str, ...] = ("cuda",)
    package: str | None = None
    recipes: frozenset[str] | None = None
    in_place: bool = False

    def absent(self, recipe: str) -> str | None:
        """Why it cannot run a recipe here, or None."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.recipes is not None and recipe not in self.recipes:
            return f"{self.name} has no kernel for {recipe}"
        return None


def compiled(**how: Any) -> Callable[[Case, Chain], Run]:
    """torch.compile of the chain as it stands."""

    def build(case: Case, chain: Chain) -> Run:
        run: Run = torch.compile(chain, dynamic=False, fullgraph=True, **how)
        return run

    return build


def fused(case: Case, chain: Chain) -> Run:
    """fxfuse as its recipe runs it."""
    backend = fxfuse.Backend(gate=RECIPES[case.recipe].gate)
    return compiled(backend=backend)(case, chain)


def norm_apart(case: Case, chain: Chain) -> Run:
    """fxfuse's projection behind Inductor's own kernel for the norm."""
    return compiled(backend=fxfuse.Backend(disable=("input_norm",)))(case, chain)


def two_kernels(streams: bool) -> Callable[[Case, Chain], Run]:
    """The norms of q and of k as a kernel each, of Inductor's; on two streams, k's beside q's."""

    def build(case: Case, chain: Chain) -> Run:
        shape, norm = case.shape, torch.compile(NORMS[case.shape.norm or "rms"], dynamic=False)
        beside: Any = torch.cuda.Stream() if streams else None  # type: ignore[no-untyped-call]

        def normed(x: Tensor, weight: Tensor) -> Tensor:
            return norm(x.view(len(x), -1, shape.head_dim), weight, shape.eps).flatten(-2)

        def run(qkv: Tensor) -> Tensor:
            q, k, v = torch.split(qkv, shape.widths(), dim=-1)
            if beside is None:
                q, k = normed(q, chain.q_weight), normed(k, chain.k_weight)
                return attended(q, k, v, shape)
            here = torch.cuda.current_stream()
            beside.wait_stream(here)
            with torch.cuda.stream(beside):
                k = normed(k, chain.k_weight)
            q = normed(q, chain.q_weight)
            here.wait_stream(beside)
            return attended(q, k, v, shape)

        return run

    return build


def packed_product(case: Case, chain: Chain) -> Run:
    """One product with the weights of q, k and v packed beforehand, then fxfuse's prelude."""
    shape, packed = case.shape, {}
    backend = fxfuse.Backend(disable=("projection",))
    behind = torch.compile(chain.prelude, backend=backend, dynamic=False, fullgraph=True)
    bias = torch.cat([getattr(chain, f"{name}_bias") for name in "qkv"]) if shape.bias else None

    def run(x: Tensor, q_proj: Tensor, k_proj: Tensor, v_proj: Tensor, *rest: Tensor) -> Outputs:
        if (key := q_proj.data_ptr()) not in packed:
            packed[key] = torch.cat((q_proj, k_proj, v_proj))
        qkv = torch.nn.functional.linear(x, packed[key], bias)
        made: Outputs = behind(*torch.split(qkv, shape.widths(), dim=-1), *rest)
        return made

    return run


def _peer(recipes: dict[str, Peer]) -> Callable[[Case, Chain], Run]:
    return lambda case, chain: recipes[case.recipe](case, chain)


TUNED = {"max_autotune": True, "coordinate_descent_tuning": True}

QK_NORM = frozenset({"qk_norm"})

OPPONENTS = {
    opponent.name: opponent
    for opponent in (
        Opponent("inductor", compiled(), ("cuda", "cpu")),
        Opponent("combo", compiled(options={"combo_kernels": True})),
        # No CUDA graphs of its own: every opponent is captured alike.
        Opponent("max_autotune", compiled(options=TUNED)),
        Opponent("fxfuse", fused, ("cuda", "cpu")),
        Opponent("packed_product", packed_product, recipes=frozenset({"projection"})),
        Opponent("norm_apart", norm_apart, recipes=frozenset({"input_norm"})),
        Opponent("two_kernels", two_kernels(streams=False), recipes=QK_NORM),
        Opponent("two_streams", two_kernels(streams=True), recipes=QK_NORM),
        *(
            Opponent(
                package,
                _peer(recipes),
                package=package,
                recipes=frozenset(recipes),
                in_place=True,
            )
            for package, recipes in PEERS.items()
        ),
    )
}
INDUCTORS = ("inductor", "combo", "max_autotune")


def choose(names: list[str] | None, recipe: str, device: str) -> list[Opponent]:
    """The opponents asked for, or all that can run here; one asked for and absent is an error."""
    if not names:
        every = OPPONENTS.values()
        return [o for o in every if device in o.devices and o.absent(recipe) is None]
    for name in names:
        if reason := OPPONENTS[name].absent(recipe):
            raise SystemExit(f"fxfuse bench: opponent {name}: {reason}")
    return [OPPONENTS[name] for name in names]
