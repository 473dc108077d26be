"""``tinygpt doctor``: what this machine lacks; and proofs that what it computes is right."""

from __future__ import annotations

from cyclopts import App, Group

from tinygpt.cli.console import aligned, say, show_json
from tinygpt.cli.flags import Switch
from tinygpt.files.disk import size
from tinygpt.machine import doctor as machine

app = App(name="doctor")
heading = Group("Proofs, each with options of its own")
app.command("tinygpt.cli.checking:check", "--kernels", group=heading)
app.command("tinygpt.cli.gradchecking:gradcheck", "--gradients", group=heading)
app.command("tinygpt.cli.proving:verify_resume", "--resume", group=heading)


@app.default
def doctor(*, json: Switch = False, clear_cache: Switch = False) -> int:
    """Look at device, compiler, caches, versions and vocabulary, and say how to mend them.

    Where there are several devices, a small step is timed on each of them. The exit code is 1 if
    something is missing that tinygpt cannot do without.

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
    checks = [*machine.examine(), *machine.time_devices()]
    healthy = all(check.ok or check.optional for check in checks)
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
