"""``tinygpt doctor``: what this machine lacks; and proofs that what it computes is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Group

from tinygpt.cli.console import aligned, say, show_json
from tinygpt.cli.flags import Count, Flat, Switch
from tinygpt.cli.options import Values, flags
from tinygpt.config import GPTConfig, Precision
from tinygpt.errors import DeviceError, UsageError, nearest
from tinygpt.files.disk import size
from tinygpt.machine import device
from tinygpt.machine import doctor as machine

if TYPE_CHECKING:
    from tinygpt.kernels.check import KernelReport, Row

SMALL_MODEL: Values = {
    "block_size": 8,
    "vocab_size": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
}
"""The shape that ``gradcheck`` checks by default: each check takes many forward passes."""

if TYPE_CHECKING:
    SmallModelFlags = dict[str, Any]
else:
    SmallModelFlags = flags(GPTConfig, "Model", SMALL_MODEL)

app = App(name="doctor")
heading = Group("Proofs, each with options of its own")


@app.default
def doctor(*, json: Switch = False, clear_cache: Switch = False) -> int:
    """Look at device, compiler, caches, versions and vocabulary, and say how to mend them.

    Where there are several devices, a small step is timed on each of them; and on the one that is
    used, how much faster or slower bfloat16 is than float32. The exit code is 1 if something is
    missing that tinygpt cannot do without.

    Parameters
    ----------
    json
        Print the checks as JSON.
    clear_cache
        First delete compiled kernels and token files, which are made again when they are needed.
    """
    if clear_cache:
        freed, failed = machine.clear_caches()
        say(f"cleared {size(freed)} of kernels and token files")
        for path in failed:
            say(f"could not delete {path}")
    checks = [*machine.examine(), *_gpu(), *machine.time_devices()]
    healthy = all(check.ok or check.optional for check in checks)
    if healthy:
        checks += _time_half()
    if json:
        show_json({"ok": healthy, "checks": [vars(check) for check in checks]})
        return 0 if healthy else 1
    marks = {(True, False): "ok", (True, True): "ok", (False, True): "optional"}
    rows = [(marks.get((c.ok, c.optional), "MISSING"), c.name, c.found) for c in checks]
    print(aligned(rows))
    cures = list(dict.fromkeys((c.name, c.cure) for c in checks if not c.ok and c.cure))
    if cures:
        print("\nTo mend it:")
        print(aligned([(f"  {name}", cure) for name, cure in cures]))
    print("\nEverything needed is there." if healthy else "\nSomething needed is missing.")
    return 0 if healthy else 1


def _gpu() -> Iterator[machine.Check]:
    """What a GPU will be used for; nothing where kernels run on the processor."""
    try:
        name = device.require_device()
    except DeviceError:
        return
    from tinygpt.kernels.wmma import plan

    if what := plan(name):
        yield machine.Check("GPU", True, what, optional=True)


def _time_half() -> Iterator[machine.Check]:
    """What bfloat16 gains or costs here."""
    from tinygpt.kernels.check.gains import gains

    found: object
    try:
        found = gains() or "this device has none"
    except Exception as error:  # whatever a device's compiler or driver raises
        found = f"could not be timed: {type(error).__name__}: {error}"
    yield machine.Check("bfloat16", True, str(found), optional=True)


# --kernels ---------------------------------------------------------------------------------------


@app.command(name="--kernels", group=heading)
def check(*kernels: str, json: Switch = False) -> int:
    """Check the fast kernels against their plain twins and float64; exit code 1 if one is wrong.

    Results and gradients are compared at a few shapes, and both ways are timed.

    Parameters
    ----------
    kernels
        Any of attention, linear, bfloat16, gelu, int8, norm, dropout, embedding, loss, adamw, muon.
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
    head, name = f"{report.kernel} on {report.device}", report.kernel
    if not report.rows:
        return f"{head}: {report.note}"
    titles = [
        ("largest error", "forward", "", "gradients", "", ""),
        ("against float64", "ours", "twin", "ours", "twin", ""),
    ]
    table = aligned([*titles, *map(_cells, report.rows)], right=[1, 2, 3, 4])
    failures = [f"{row.shape}: {row.failure}" for row in report.rows if row.failure]
    notes = [f"({report.note})"] if report.note else []
    verdict = f"{name}: all agree, the largest error is {report.worst:.1e}"
    if wrong := sum(not row.passed for row in report.rows):
        verdict = f"{name}: {wrong} of {len(report.rows)} shapes are wrong"
    elif speed := report.speed:
        times = f"{speed.ours * 1e3:.2f} ms and {speed.twin * 1e3:.2f} ms at {speed.shape}"
        verdict += f"; {speed.ratio:.1f} times as fast as the twin ({times})"
    return "\n".join([head, table, *failures, *notes, verdict])


def _cells(row: Row) -> tuple[str, ...]:
    errors = (row.forward, row.twin_forward, row.gradients, row.twin_gradients)
    shown = ("" if error is None else f"{error:.1e}" for error in errors)
    return (row.shape, *shown, "" if row.passed else "WRONG")


# --gradients -------------------------------------------------------------------------------------


@app.command(name="--gradients", group=heading)
def gradcheck(
    *,
    model: Annotated[SmallModelFlags | None, Flat] = None,
    batch_size: Count = 2,
    samples: int = 3,
    seed: int = 1337,
    dtype: Precision = "float32",
    json: Switch = False,
) -> int:
    """Check the model's gradients against numeric ones in float64; exit code 1 if one is wrong.

    Without flags it checks a small model; with --model flags one of that shape.

    Parameters
    ----------
    batch_size
        Sequences of random tokens in the batch.
    samples
        Single elements tried per parameter, besides a random direction.
    seed
        Seed of weights, tokens and directions.
    dtype
        Type of the gradients' products, as in a step of training; numeric ones stay float64.
    json
        Print the report as JSON.
    """
    config = GPTConfig.from_dict({**SMALL_MODEL, **(model or {})})
    device.require_device()
    import numpy as np
    from tinygrad import Tensor

    from tinygpt.model.transformer import Transformer
    from tinygpt.training.gradcheck import gradcheck as check

    shape = (batch_size, config.block_size + 1)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, shape, np.int32)
    idx, targets = Tensor(tokens[:, :-1].copy()), Tensor(tokens[:, 1:].copy())
    model_checked = Transformer(config, seed)
    report = check(model_checked, idx, targets, samples=samples, seed=seed, dtype=dtype)
    if json:
        show_json(report.to_dict())
    else:
        print(report.table())
    return 0 if report.ok else 1


app.command("tinygpt.cli.proving:verify_resume", "--resume", group=heading)
