"""The tables and pictures of bench.py."""

from __future__ import annotations

import statistics
from pathlib import Path

from contestants import OTHERS, Contestant
from machine import pyplot
from wrk import CONNECTIONS

from npair.serving.engine import cores


def report(contestants: list[Contestant], limits: list[float]) -> str:
    npair = contestants[0]
    most = CONNECTIONS[-1]
    lines = [
        f"On {cores()} cores; medians of {len(limits)} rounds, and from the least to the most.",
        "",
        f"| server | workers, threads, calls, batch | photos/s at {most} | npair's ratio "
        f"| p50 ms at 1 | at 8 | at {most} | p99 ms at {most} | MB | first answer s |",
        "|" + " --- |" * 10,
    ]
    for c in sorted(contestants, key=lambda c: -c.median("rate", most)):
        ratios = [
            mine / other for mine, other in zip(npair.rates(most), c.rates(most), strict=True)
        ]
        s = c.setting
        setting = (
            "" if c.peer is npair.peer else f"{s.workers}, {s.threads}, {s.concurrency}, {s.batch}"
        )
        spread = (
            ""
            if c is npair
            else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        latencies = " | ".join(
            f"{c.median('p50', number):.1f}" if c.rates(number) else "" for number in CONNECTIONS
        )
        lines.append(
            f"| {c.name} | {setting} | {c.median('rate', most):.0f} | {spread} | {latencies} "
            f"| {c.median('p99', most):.0f} | {statistics.median(c.megabytes):.0f} "
            f"| {statistics.median(c.first_answer):.1f} |"
        )
    shares = [mine / limit for mine, limit in zip(npair.rates(most), limits, strict=True)]
    lines += [
        "",
        f"Without a server: {statistics.median(limits):.0f} photos/s; npair reaches "
        f"{statistics.median(shares):.2f}",
    ]
    lines[-1] += f" ({min(shares):.2f} to {max(shares):.2f}) of it."
    for mode, words in (
        ("eager", "as documented"),
        ("npair", "with npair's engine and decoder inside"),
    ):
        of_mode = [c for c in contestants if c.mode == mode and c.peer is not npair.peer]
        if of_mode:
            best = max(of_mode, key=lambda c: c.median("rate", most))
            lone = min(of_mode, key=lambda c: c.lone)
            ratio, alone = (
                npair.median("rate", most) / best.median("rate", most),
                npair.median("p50", 1),
            )
            lines.append(
                f"Best peer {words}: {best.peer.name}, of which npair has {ratio:.2f} times the "
                f"photos/s, and {alone / best.median('p50', 1):.2f} of the p50 at one connection; "
                f"{alone / lone.lone:.2f} of the least with any setting, {lone.lone:.1f} ms of "
                f"{lone.peer.name}."
            )
    for c in contestants[1:]:
        if c.peer is npair.peer or c.mode in OTHERS:
            ratio, alone = (
                npair.median("rate", most) / c.median("rate", most),
                npair.median("p50", 1) / c.median("p50", 1),
            )
            lines.append(
                f"{c.name}: npair has {ratio:.2f} times the photos/s, and {alone:.2f} of the p50 "
                "at one connection."
            )
    return "\n".join(lines)


def draw(contestants: list[Contestant], limits: list[float], path: Path) -> None:
    """Draw bars of photos per second, with the range over the rounds."""
    plt = pyplot()
    most = CONNECTIONS[-1]
    ordered = sorted(contestants, key=lambda c: c.median("rate", most))
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(ordered) + 1), layout="constrained")
    colours = [
        "C0" if c.peer.name == "npair" else "C1" if c.mode == "npair" else "0.6" for c in ordered
    ]
    middle = [c.median("rate", most) for c in ordered]
    around = [
        [m - min(c.rates(most)) for m, c in zip(middle, ordered, strict=True)],
        [max(c.rates(most)) - m for m, c in zip(middle, ordered, strict=True)],
    ]
    axes.barh(
        [c.name for c in ordered], middle, xerr=around, color=colours, ecolor="0.3", capsize=3
    )
    axes.axvline(statistics.median(limits), color="C3", linestyle=":", label="without a server")
    axes.set_xlabel(f"photos a second at {most} connections")
    axes.legend(loc="lower right")
    figure.savefig(path)
    plt.close(figure)
