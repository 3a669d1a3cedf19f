"""`fxfuse doctor`: what fxfuse finds on this machine, and whether its kernels are right here."""

import argparse
import importlib.util
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata

import torch

import fxfuse
from fxfuse import torch_private
from fxfuse.lowering import libraries, providers
from fxfuse.tools import self_test
from fxfuse.tools.models import device_of

PACKAGES = ("torch", "triton", "transformers", "diffusers")
VARIABLES = ("FXFUSE_", "TORCHINDUCTOR_", "TORCH_LOGS", "TORCH_COMPILE", "TORCHDYNAMO_", "TRITON_")


def add_arguments(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Enter `doctor` into a parser."""
    words = "Versions, devices, who lowers what, Inductor's caches, and a self-test."
    doctor = subcommands.add_parser("doctor", help=words, description=words)
    doctor.add_argument("--device", choices=["cpu", "cuda"], help="the GPU if there is one")
    doctor.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what there is, then test one site of each provider; 1 where one is wrong."""
    device = device_of(args.device)
    for name, value in found():
        print(f"{name:16s} {value}")
    print(f"\nself-test on {device}: one site of each provider, compiled anew", flush=True)
    wrong = False
    for result in self_test.results(device):
        print(f"  {result}", flush=True)
        wrong |= result.wrong
    if wrong:
        print("a kernel is wrong or fails here: please report the lines above", file=sys.stderr)
    return int(wrong)


def found() -> Iterator[tuple[str, str]]:
    """What there is, by name."""
    yield "fxfuse", f"{fxfuse.__version__}, {os.path.dirname(fxfuse.__file__)}"
    yield "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        # What torch says of itself names its build too.
        yield package, str(torch.__version__) if package == "torch" else version(package)
    yield "CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; {_lowers('cpu')}"
    for index in range(torch.cuda.device_count()):
        at = torch.cuda.get_device_properties(index)
        about = f"{at.name}, {at.total_memory / 1e9:.0f} GB, capability {at.major}.{at.minor}"
        yield f"GPU {index}", f"{about}; {_lowers('cuda')}"
    if not torch.cuda.is_available():
        yield "GPU", "none that torch sees"
    yield "providers", ", ".join(dict.fromkeys(p.name for p in providers.PROVIDERS))
    for library in libraries.LIBRARIES:
        yield library.name, _library(library)
    passes = torch_private.inductor_passes()
    yield (
        "Inductor passes",
        ", ".join(f"{n}: {_named(p)}" for n, p in passes.items()) or "none but Inductor's own",
    )
    if torch_private.keeps_rounding_points():
        yield "Inductor config", "emulate_precision_casts is on: nothing is fused"
    yield "caches", cache_folder()
    given = (f"{n}={v}" for n, v in sorted(os.environ.items()) if n.startswith(VARIABLES))
    # torch itself sets the folder's variable.
    told = [x for x in given if not x.startswith("TORCHINDUCTOR_CACHE_DIR=")]
    yield "environment", ", ".join(told) or "nothing set"


def version(package: str) -> str:
    """Of an installed package."""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "installed, of no known version"


def cache_folder() -> str:
    """Inductor's, and whether it can be written."""
    try:
        folder = torch_private.inductor_cache_folder()
        with tempfile.TemporaryFile(dir=folder):
            return f"{folder}, can be written"
    except OSError as error:
        return f"CANNOT be written: {error}; set TORCHINDUCTOR_CACHE_DIR to a folder that can"


def _lowers(device: str) -> str:
    if device == "cpu":
        return "fused sites are loops, compiled by Inductor to C++"
    if importlib.util.find_spec("triton") is None:
        return "NO triton: fused sites are left to loops, which Inductor cannot compile without it"
    return "fused sites are Triton kernels, the rest loops"


def _library(library: libraries.Library) -> str:
    if not library.installed():
        return "not installed"
    taken = libraries.platform() in library.platforms and torch.cuda.is_available()
    here = "asked for residual add + norm" if taken else "not asked here"
    return f"{version(library.name)}, {here} (it is for {', '.join(library.platforms)})"


def _named(found: object) -> str:
    if isinstance(found, (list, tuple)):
        return " ".join(map(_named, found))
    kind = type(found)
    return getattr(found, "__name__", None) or f"{kind.__module__}.{kind.__qualname__}"
