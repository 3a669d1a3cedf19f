"""One compile: a Dynamo graph in, compiled code and the report out."""

import functools
import hashlib
import pathlib
import time
from collections.abc import Callable
from typing import Any

from torch import fx

from fxfuse.lowering import providers
from fxfuse.passes import fuse_graph
from fxfuse.report import Report, publish
from fxfuse.settings import Settings


def compiled(
    gm: fx.GraphModule, settings: Settings, compile_graph: Callable[[fx.GraphModule, str], Any]
) -> tuple[Any, Report]:
    """What `compile_graph` makes of the fused graph and a tag for its caches, and the report,
    published.
    """
    while True:
        fused, report = fuse_graph(gm, settings)
        start, failures = time.perf_counter(), providers.failures()
        tag = f"{source_tag()}-{choice_tag(report)}"
        try:
            code = compile_graph(fused, tag)
            break
        except Exception:
            # A provider failed: its graph is done for, the next one is asked on a new copy.
            if providers.failures() == failures:
                raise
    report.milliseconds["compile"] = 1e3 * (time.perf_counter() - start)
    publish(report)
    return code, report


@functools.cache
def source_tag() -> str:
    """A digest of fxfuse's own sources, for the keys of Inductor's caches: a lowering is in no key
    by itself.
    """
    digest = hashlib.sha256()
    root = pathlib.Path(__file__).parent
    for path in sorted(
        p for folder in (".", "patterns", "lowering") for p in (root / folder).glob("*.py")
    ):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return f"fxfuse-{digest.hexdigest()[:16]}"


def choice_tag(report: Report) -> str:
    """A digest of the table of providers and of what was chosen from it, for the same keys."""
    chosen = sorted({(site.op, site.provider) for site in report.fused})
    return hashlib.sha256(f"{providers.table_tag()} {chosen}".encode()).hexdigest()[:16]
