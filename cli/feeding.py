"""The table of loaders, formats, queues and periods that `--plan` and `--doctor` print."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence

import typer

from pss.config import Config
from pss.planning.feeding import DEPTHS_GB, Feed, crops_at_once, keeping_up
from pss.planning.plan import Plan
from pss.planning.simulation import prepared_batches

_SHORT = re.compile(r"schedule\.|=true")


def show_feeding(
    config: Config,
    planned: Plan,
    feeds: Sequence[Feed],
    chosen: Feed,
    level_seconds: Callable[[Feed], Sequence[float]],
    processes: int = 1,
    device: str = "cuda",
) -> None:
    """Which of the feeds keep the steps fed, with which queue and which schedule; and what the chosen one loses.

    `level_seconds`: as `pss.planning.feeding.keeping_up` wants it.
    """
    feeds = list(feeds)
    if config.data.decode_once == 1 and (several := crops_at_once(chosen, 3)) is not None:
        feeds.insert(feeds.index(chosen) + 1, several)
    own = config.data.prefetch_bytes(device) / 1e9
    depths = sorted({own, *DEPTHS_GB})
    rows = keeping_up(
        config, planned, feeds, level_seconds, processes, depths, own=own, prepared=prepared_batches(device)
    )
    sources = {feed.source for feed in feeds}
    each = " of each GPU" if processes > 1 else ""
    typer.echo(f"\nwhat keeps the steps fed: the share of waiting, by loader and depth of the queue{each}")
    heads = "".join(f"{f'{depth:g} GB':>7}" for depth in depths)
    typer.echo(f"  {'loader':<20} {'decodes':>8}{heads} {'img/s':>7} {'run':>7}  kept fed by")
    for row in rows:
        waits = "".join(f"{wait:>7.1%}" for wait in row.waits)
        mark = ">" if row.feed == chosen else " "
        about = "~" if row.feed.source == "assumed" and len(sources) > 1 else ""
        even = _SHORT.sub("", row.even or "– (too slow)").replace("period_steps=", "period ")
        if row.even and row.even_gb != own:
            even = f"{row.even_gb:g} GB" + f", {even}" * (row.even != "as set")
        typer.echo(
            f"{mark} {row.feed.name:<20} {f'{about}{row.feed.images_per_second:,.0f}':>8}{waits} "
            f"{row.images_per_second:>7,.0f} {hours(row.seconds):>7}  {even}"
        )
    row = rows[feeds.index(chosen)]
    fed = planned.total_steps * planned.batch_size / row.fed_seconds
    notes = [
        f"> trains this run, {row.images_per_second:,.0f} img/s in {hours(row.seconds)}: it loses "
        f"{1 - row.fed_seconds / row.seconds:.1%} of the time, with data always there {fed:,.0f} img/s in "
        f"{hours(row.fed_seconds)}",
        f"img/s and run are with data.prefetch_gb={own:g} and the schedule as set; kept fed is at most 1 % waiting, "
        "with such a queue (data.prefetch_gb) and schedule.period_steps, which leaves as many steps at each ρ and "
        "makes the demand more even; schedule.shuffle=true is another way",
    ]
    if "assumed" in sources and len(sources) > 1:
        notes.append("~ is in proportion to what is measured, by the rates of 16 cores")
    if any("GPU+CPU" in feed.name for feed in feeds):
        notes.append("GPU+CPU is data.gpu_decoding.cpu_share, to be tried out; their rates are added up")
    if any("crops" in feed.name for feed in feeds):
        notes.append("3 crops are data.decode_once=3, in the place of data.repeats")
    for note in notes:
        print_wrapped(note)


def print_wrapped(text: str, indent: str = "") -> None:
    """A paragraph of at most 100 columns."""
    for line in textwrap.wrap(text, 98 - len(indent), break_on_hyphens=False):
        typer.echo(indent + line)
        indent = " " * len(indent)


def hours(seconds: float) -> str:
    """As a person says it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
