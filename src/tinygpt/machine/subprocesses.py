"""Jobs for several processes: each is a child that takes a line of JSON and answers with lines.

A child is a module of ours run as a program. It ends when its input ends, so that none is left if
this process is killed.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tinygpt.errors import DataError, TinyGPTError, TokenizerError
from tinygpt.files.strict_json import to_json
from tinygpt.machine.children import python_module

Report = tuple[str, Any]
FAILURES: dict[str, type[TinyGPTError]] = {"TokenizerError": TokenizerError}


def work_in_processes(
    module: str, jobs: Sequence[Mapping[str, Any]], processes: int
) -> Iterator[Report]:
    """Give the jobs to children that run ``module``; yield what they report, in any order.

    A child answers a job with reports and at last with ``["done", null]``; ``["failed", [kind,
    message]]`` is raised here as an error of that kind. A child that dies is a DataError.
    """
    waiting: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
    # one thread for each child: it hands out the next job when the last is done
    children = [_start(module) for _ in range(max(1, min(processes, len(jobs))))]
    threads = [
        threading.Thread(target=_attend, args=(child, waiting, reports), daemon=True)
        for child in children
    ]
    try:
        for thread in threads:
            thread.start()
        busy = len(threads)
        while busy:
            kind, value = reports.get()
            if kind == "ended":
                busy -= 1
            elif kind == "failed":
                raise FAILURES.get(value[0], DataError)(value[1])
            else:
                yield kind, value
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()
        for thread in threads:
            thread.join()


def _start(module: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        **python_module(module),
        stdin=pipe,
        stdout=pipe,
        text=True,
        encoding="utf-8",
        process_group=0,  # Ctrl-C reaches this process, which ends the children
    )


def _attend(
    child: subprocess.Popen[str],
    waiting: queue.SimpleQueue[Mapping[str, Any]],
    reports: queue.SimpleQueue[Report],
) -> None:
    """Give a child one job after another, and pass on what it reports."""
    assert child.stdin is not None and child.stdout is not None
    with suppress(OSError), child.stdin, child.stdout:  # a broken pipe: it has died
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                reports.put(("ended", None))
                return
            child.stdin.write(to_json(job, compact=True) + "\n")
            child.stdin.flush()
            for line in child.stdout:
                kind, value = json.loads(line)
                if kind == "done":
                    break
                reports.put((kind, value))
            else:
                break
    code = child.wait()
    reports.put(("failed", ("DataError", _died(code))))


def _died(code: int) -> str:
    why = " Perhaps the memory ran out: try --threads 1." if code == -9 else ""
    return f"A process that worked at this has ended with exit code {code}.{why} Start it again."
