"""``tinygpt doctor --kernels``: whether the fast kernels are right here, and how fast they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinygpt.cli.console import aligned, say, show_json
from tinygpt.cli.flags import Switch
from tinygpt.errors import UsageError, nearest
from tinygpt.machine import device

if TYPE_CHECKING:
    from tinygpt.kernels.check import KernelReport, Row, Speed


def check(*kernels: str, json: Switch = False) -> int:
    """Check the fast kernels against their plain twins and float64; exit code 1 if one is wrong.

    Results and gradients are compared at a few shapes, and both ways are timed.

    Parameters
    ----------
    kernels
        Any of attention, linear, gelu, int8, norm, dropout, embedding, loss, adamw, muon.
        [default: all of them]
    json
        Print the reports as JSON.
    """
    device.require_device()
    from tinygpt.kernels.check import check_kernel
    from tinygpt.kernels.check.cases import KERNELS

    known = list(KERNELS)
    for name in kernels:
        if name not in known:
            raise UsageError(
                f"There is no kernel {name!r}.{nearest(name, known)} Kernels: {', '.join(known)}."
            )
    reports = []
    for name in dict.fromkeys(kernels or known):
        say(f"checking {name}")
        reports.append(check_kernel(name))
        if not json:
            print(f"{_text(reports[-1])}\n", flush=True)
    ok = all(report.ok for report in reports)
    if json:
        show_json({"ok": ok, "kernels": [report.to_dict() for report in reports]})
    elif len(reports) > 1:
        wrong = ", ".join(report.kernel for report in reports if not report.ok)
        print(f"These are wrong: {wrong}." if wrong else "All is well.")
    return 0 if ok else 1


def _text(report: KernelReport) -> str:
    """A table of the errors, and what follows from it."""
    head = f"{report.kernel} on {report.device}"
    if not report.rows:
        return f"{head}: {report.note}"
    titles = [
        ("largest error", "forward", "", "gradients", "", ""),
        ("against float64", "ours", "twin", "ours", "twin", ""),
    ]
    table = aligned([*titles, *map(_cells, report.rows)], right=[1, 2, 3, 4])
    failures = [f"{row.shape}: {row.failure}" for row in report.rows if row.failure]
    notes = [f"({report.note})"] if report.note else []
    return "\n".join([head, table, *failures, *notes, _verdict(report)])


def _cells(row: Row) -> tuple[str, ...]:
    errors = (row.forward, row.twin_forward, row.gradients, row.twin_gradients)
    shown = ("" if error is None else f"{error:.1e}" for error in errors)
    return (row.shape, *shown, "" if row.passed else "WRONG")


def _verdict(report: KernelReport) -> str:
    wrong = sum(not row.passed for row in report.rows)
    if wrong:
        return f"{report.kernel}: {wrong} of {len(report.rows)} shapes are wrong"
    speed = f"; {_speed(report.speed)}" if report.speed else ""
    return f"{report.kernel}: all agree, the largest error is {report.worst:.1e}{speed}"


def _speed(speed: Speed) -> str:
    return (
        f"{speed.ratio:.1f} times as fast as the twin "
        f"({speed.ours * 1e3:.2f} ms and {speed.twin * 1e3:.2f} ms at {speed.shape})"
    )
