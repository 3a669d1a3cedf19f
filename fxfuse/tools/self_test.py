"""Whether each provider's code is right on this machine: a small site of each, compiled by Inductor
with empty caches and compared with float64.

In: a device. Out: a Result for each provider of the table; one that is not for the device, or not
installed, says so and is not wrong.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fxfuse import torch_private
from fxfuse.bench import check, recipes
from fxfuse.bench.chains import AddNorm, Chain, rms_norm
from fxfuse.bench.recipes import Inputs
from fxfuse.entry import Fresh
from fxfuse.lowering import providers
from fxfuse.lowering.providers import Provider
from fxfuse.report import Report, collected
from fxfuse.tools.reading import Reading

Site: TypeAlias = tuple[Chain, Inputs]
TOKENS, HEADS, KV_HEADS, HIDDEN = 5, 4, 2, 256


class Norm(AddNorm):
    """RMSNorm alone: what libraries take whose kernels round the sum elsewhere."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return rms_norm(x, self.weight, self.shape.eps)


def _chain(recipe: str, tokens: int = TOKENS) -> Callable[[str], Site]:
    def made(device: str) -> Site:
        case = recipes.cases(recipe, device, [tokens])[0]
        shape = dataclasses.replace(case.shape, heads=HEADS, kv_heads=KV_HEADS, hidden=HIDDEN)
        case = dataclasses.replace(case, shape=shape)
        return recipes.chain(case, device), recipes.draw(case, device, 0)

    return made


def _norm(device: str) -> Site:
    chain, inputs = _chain("add_norm")(device)
    norm = Norm(chain.shape).to(device)
    norm.load_state_dict(chain.state_dict())
    return norm, Inputs(inputs.args[:1])


# Chains that become an op. The first op that a provider knows is tested, on the first chain that it
# takes.
SITES: dict[str, tuple[Callable[[str], Site], ...]] = {
    "norm_rope_store_": (_chain("prelude"),),
    "norm_rope": (_chain("qk_norm"),),
    "project_norm_rope_store_": (_chain("projection"),),
    "add_rms_norm": (_chain("add_norm"), _norm),
    "decode_attention": (_chain("grouped_heads", tokens=1),),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one provider. Errors are relative, against float64."""

    provider: str
    op: str
    wrong: bool
    told: str

    def __str__(self) -> str:
        return f"{self.provider:12s} {self.op:24s} {self.told}"


def results(device: str) -> Iterator[Result]:
    """One after the other, in the order in which the providers are asked."""
    for provider in list(providers.PROVIDERS):
        op = next(op for op in SITES if op in provider.ops)
        with providers.asked_first(provider), torch.no_grad():
            try:
                wrong, told = _tested(provider, op, device)
            except Exception as error:
                wrong, told = True, f"FAILED: {type(error).__name__}: {error}".splitlines()[0]
        yield Result(provider.name, op, wrong, told)


def _tested(provider: Provider, op: str, device: str) -> tuple[bool, str]:
    reasons = []
    for site in SITES[op]:
        chain, inputs = site(device)
        reason = _not_taken(provider, _report(chain, inputs.args, Reading(gate="always")))
        if not reason:
            return _compared(provider, chain, inputs)
        reasons.append(reason)
    return False, f"not asked here: {'; '.join(dict.fromkeys(reasons))}"


def _compared(provider: Provider, chain: Chain, inputs: Inputs) -> tuple[bool, str]:
    wanted = check.truth(chain, inputs)
    start = time.perf_counter()
    compiled: Any = torch.compile(chain, backend=Fresh(gate="always"), dynamic=False)
    with torch_private.empty_caches(), collected() as report:
        error, wrong = check.check(compiled, inputs, wanted, in_place=False)
    if wrong := providers.failure_of(provider) or _not_taken(provider, report) or wrong:
        return True, f"WRONG: {wrong}"
    seconds = time.perf_counter() - start
    return False, f"right: error {error:.1e}, eager's {wanted.eager_error:.1e} ({seconds:.1f} s)"


def _report(chain: Any, args: tuple[Any, ...], backend: Fresh) -> Report:
    compiled: Any = torch.compile(chain, backend=backend, dynamic=False)
    with collected() as report:
        compiled(*(x.clone() for x in args))
    return report


def _not_taken(provider: Provider, report: Report) -> str:
    """Why the one site of a report is not a provider's."""
    if len(report.fused) != 1:
        return f"{len(report.fused)} sites were fused where one was wanted: {report}"
    (site,) = report.fused
    if site.provider == provider.name:
        return ""
    return dict(site.declined).get(provider.name, f"{site.provider} took it")
