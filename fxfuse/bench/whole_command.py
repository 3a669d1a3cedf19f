"""The recipe `fxfuse bench e2e`: its arguments, the loop over models, its table and JSON."""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

from fxfuse.bench import arguments, groups, rows, show, timing, whole
from fxfuse.bench.groups import Total
from fxfuse.bench.models import MODELS
from fxfuse.bench.whole import Plan, Whole
from fxfuse.progress import progress

DENOISE = "Flux"


def add_arguments(names: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Enter `e2e` beside the other recipes."""
    words = "Whole models with random weights: decode, prefill, generate() and a denoise step, ms."
    one = names.add_parser("e2e", help=words, description=words)
    one.add_argument("--models", nargs="+", choices=[*MODELS, DENOISE])
    one.add_argument("--batch", type=arguments.positive, nargs="+", default=[1, 16])
    one.add_argument("--opponents", nargs="+", choices=list(whole.BACKENDS))
    one.add_argument("--phases", nargs="+", choices=whole.PHASES, default=list(whole.PHASES))
    one.add_argument("--layers", type=arguments.positive, help="depth, instead of the real one")
    one.add_argument("--slots", type=arguments.positive, default=1024, help="of the static cache")
    one.add_argument("--prefill", type=arguments.positive, default=512, metavar="T")
    one.add_argument("--new-tokens", type=_two_or_more, default=128, metavar="N")
    modes = ["default", "reduce-overhead", "max-autotune"]
    one.add_argument("--mode", choices=modes, default="reduce-overhead")
    words = "write every kernel of a decode step in order: its group, µs and name"
    one.add_argument("--kernels", type=Path, metavar="FILE", help=words)
    arguments.add_shared(one, rounds=50)
    one.set_defaults(run=run)


def _two_or_more(text: str) -> int:
    """The first token comes of the prompt, only the others of compiled steps."""
    tokens = arguments.positive(text)
    if tokens < 2:
        raise argparse.ArgumentTypeError("the first token is the prompt's, wanted 2 or more")
    return tokens


def run(args: argparse.Namespace) -> int:
    """Measure what is asked for; 1 where something was wrong."""
    device = arguments.device_of(args.device)
    arguments.need("transformers", "e2e")
    if args.models and DENOISE in args.models:
        arguments.need("diffusers", DENOISE)
    if whole.PROMPT + whole.decoded(args.rounds) > args.slots:
        raise SystemExit("fxfuse bench: more --rounds than --slots hold")
    if whole.PROMPT + args.new_tokens > args.slots:
        raise SystemExit("fxfuse bench: more --new-tokens than --slots hold")
    copy_speed = 0.0 if args.compile_only else timing.copy_bytes_per_us(device)
    found = rows.started(device, copy_speed)
    done: list[Whole] = []

    def told(row: Whole) -> None:
        done.append(row)
        print("  ".join(f"{k}={v}" for k, v in line(row, done).items() if v), flush=True)
        if args.json and not args.compile_only:
            args.json.write_text(json.dumps(_data(found, done, args), indent=1) + "\n")
        if args.kernels and row.groups:
            with args.kernels.open("a") as file:
                file.write(_in_order(row))

    asked = plans(args)
    with progress(len(asked)) as begin:
        for name, plan in asked.items():
            begin(name)
            if name == DENOISE:
                whole.denoise(plan, args, device, told)
            else:
                whole.measure(MODELS[name], plan, args, device, told)
    if not args.compile_only:
        if any(row.groups for row in done):
            show.table([_grouped(row) for row in done if row.groups], "µs (kernels) of a step")
        show.table([line(row, done) for row in done], f"{show.head(found)}; {args.mode}")
    return int(any(row.wrong for row in done))


def plans(args: argparse.Namespace) -> dict[str, Plan]:
    """Models, batches and backends of this shard."""
    installed = importlib.util.find_spec("diffusers") is not None
    names = args.models or [*MODELS, *([DENOISE] if installed else [])]
    backends = args.opponents or list(whole.BACKENDS)
    i, n = args.shard
    found: dict[str, Plan] = {}
    for name, batch, backend in [
        (name, batch, b) for name in names for batch in args.batch for b in backends
    ][i::n]:
        found.setdefault(name, {}).setdefault(batch, []).append(backend)
    return found


def _stock(row: Whole, done: list[Whole]) -> Whole | None:
    """The row of stock Inductor beside one of fxfuse."""
    if row.backend != "fxfuse":
        return None
    key = (row.model, row.phase, row.batch)
    same = [r for r in done if (r.model, r.phase, r.batch) == key and r.backend == "inductor"]
    return same[0] if same else None


def ratios(row: Whole, done: list[Whole]) -> tuple[float | None, float | None]:
    """Stock's time over fxfuse's, waiting and queued."""
    stock = _stock(row, done)
    pairs = [(stock.ms, row.ms), (stock.queued_ms, row.queued_ms)] if stock else [(None, None)] * 2
    a, b = (s.median / own.median if s and own else None for s, own in pairs)
    return a, b


def line(row: Whole, done: list[Whole]) -> dict[str, str]:
    """The cells of one row by heading."""
    waiting, queued = ratios(row, done)
    cells = {"model": row.model, "phase": row.phase, "batch": str(row.batch)}
    cells |= {"layers": str(row.layers), "backend": row.backend, "error": f"{row.error:.1e}"}
    cells["fused"] = f"{row.sites}, {row.stores} stored" if row.backend == "fxfuse" else ""
    if row.ms:
        cells["ms"] = f"{row.ms.median:.3f} ({row.ms.p20:.3f}-{row.ms.p80:.3f})"
    if row.queued_ms:
        cells["queued ms"] = f"{row.queued_ms.median:.3f}"
    cells["tokens/s"] = show.text(row.tokens_per_s(), ".0f")
    cells["step MB"] = show.text(row.step_bytes and row.step_bytes / 1e6, ".1f")
    cells["kernels"] = "" if row.kernels is None else str(row.kernels)
    cells["compile s"] = f"{row.compile_s:.1f}"
    cells |= {"/stock": show.text(waiting), "/stock queued": show.text(queued)}
    return cells | {"note": row.wrong or ""}


def _grouped(row: Whole) -> dict[str, str]:
    """What a decode step's groups of kernels take, and all of them."""
    told = {"model": row.model, "batch": str(row.batch), "backend": row.backend}
    totals = dict(row.groups or {})
    whole = Total(sum(t.us for t in totals.values()), sum(t.kernels for t in totals.values()))
    totals["all"] = whole
    return told | {name: f"{t.us:.1f} ({t.kernels})" for name, t in totals.items()}


def _in_order(row: Whole) -> str:
    """A head, and a line for each kernel."""
    names = groups.grouped([kernel.name for kernel in row.traced], row.layers)
    lines = [f"{g}\t{k.us:.2f}\t{k.name}" for g, k in zip(names, row.traced, strict=True)]
    return "\n".join([f"# {row.model} batch={row.batch} {row.backend}", *lines, ""])


def _data(found: rows.Results, done: list[Whole], args: argparse.Namespace) -> dict[str, Any]:
    told = dataclasses.asdict(found) | {"mode": args.mode, "slots": args.slots}
    told["versions"]["transformers"] = importlib.metadata.version("transformers")
    told["rows"] = [dataclasses.asdict(row) for row in done]
    del told["smallest_kernel_us"]
    for data, row in zip(told["rows"], done, strict=True):
        del data["traced"]
        data["tokens_per_s"] = row.tokens_per_s()
        data["against_stock"], data["against_stock_queued"] = ratios(row, done)
    return told
