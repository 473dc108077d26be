"""Kills processes that save, and looks at what they leave: FOLDER random|operations|runs COUNT.

The first two do without tinygrad, so a process is a fork of this one, and hundreds die in seconds.
"""

import json
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from tinygpt.config import GPTConfig
from tinygpt.files.atomic import remove_stale
from tinygpt.files.tensor_file import arrange
from tinygpt.runs import checkpoint
from tinygpt.runs.folder import best_checkpoint, list_checkpoints

CONFIG = GPTConfig(block_size=4, vocab_size=11, n_layer=1, n_head=2, n_embd=64)
SIZE = CONFIG.num_params()
KEEP = 2
OPERATIONS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "close")


def snapshot(step):
    """The state of a step: every number of it says which step it is."""
    kinds = [(name, np.dtype("f4"), (SIZE,)) for name in ("model.w", "optimizer.m", "optimizer.v")]
    made = checkpoint.Snapshot(arrange(kinds))
    for name in made.layout:
        made.array(name)[:] = step
    return made


def save(saver, step):
    """Every third step is the best so far, which has best.json written too."""
    meta = checkpoint.Meta(step, CONFIG)
    saver.save_snapshot(snapshot(step), meta, best_loss=1 / step if step % 3 == 0 else None)
    saver.wait()
    assert saver.newest.name == f"ckpt_{step}.safetensors", saver.news()


def resume(folder):
    """-> the step of the newest checkpoint; none in the folder may be damaged"""
    path, problems = checkpoint.newest_good(folder)
    assert problems == [], problems
    if path is None:
        return 0
    for other in list_checkpoints(folder):
        meta, arrays = checkpoint.read(other)
        assert all((array == meta.iter_num).all() for array in arrays.values())
    best = best_checkpoint(folder)
    assert (best is None) == (not (folder / "best.json").exists()), "the best one is gone"
    remove_stale(folder)
    assert not list(folder.glob(".*"))
    return checkpoint.read_meta(path).iter_num


def child(work):
    """The number of a new process that does ``work`` and ends."""
    number = os.fork()
    if number == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    return number


# ---- at random moments ----


def kill_at_random(folder, count):
    done = Counter()
    chance = random.Random(0)
    resume(folder)
    for _ in range(count):
        said, tell = os.pipe()

        def work(tell=tell):
            saver = checkpoint.Saver(folder, KEEP)
            step = resume(folder)
            os.write(tell, b"%d\n" % step)
            while True:
                step += 1
                save(saver, step)
                os.write(tell, b"%d\n" % step)

        number = child(work)
        os.close(tell)
        select.select([said], [], [], 60)
        time.sleep(chance.uniform(0, 0.06))
        os.kill(number, signal.SIGKILL)
        _, status = os.waitpid(number, 0)
        assert os.WIFSIGNALED(status), "it ended by itself"
        with os.fdopen(said) as lines:
            promised = int(lines.read().splitlines()[-1])
        done["kills"] += 1
        done["left a temporary"] += bool(list(folder.glob(".*")))
        found = resume(folder)
        assert found in (promised, promised + 1), (promised, found)
        done["left the new one"] += found == promised + 1
    done["checkpoints"] = found
    return done


# ---- after every operation ----


def watch(then):
    """Have ``then(number, name, arguments)`` called after each file operation of this process.

    It is called before a write, too, with half of it written.
    """
    count = 0

    def wrap(name, original):
        def wrapped(*args, **kwargs):
            nonlocal count
            if name == "write":
                handle, data = args
                half = original(handle, memoryview(data)[: len(data) // 2])
                count += 1
                then(count, "half a write", args)
                rest = original(handle, memoryview(data)[half:])
                result = half + rest
            else:
                result = original(*args, **kwargs)
            count += 1
            then(count, name, args)
            return result

        return wrapped

    for name in OPERATIONS:
        setattr(os, name, wrap(name, getattr(os, name)))


def kill_after_each_operation(folder, _):
    """A save with everything in it: a new folder or an old one to delete from, and a best one."""
    done = Counter()
    for before in (0, 4):  # steps that are there already
        number, killed = 0, True
        while killed:
            number += 1
            here = folder / f"{before}-{number}"
            saver = checkpoint.Saver(here, KEEP)
            for step in range(1, before + 1):
                save(saver, step)
            step = 3 if before == 0 else 6

            def work(here=here, step=step, number=number):
                def kill(count, name, args):
                    if count == number:
                        sys.stdout.write(f"{name}\n")
                        sys.stdout.flush()
                        os.kill(os.getpid(), signal.SIGKILL)

                saver = checkpoint.Saver(here, KEEP)
                watch(kill)
                save(saver, step)

            _, status = os.waitpid(child(work), 0)
            killed = os.WIFSIGNALED(status)
            assert killed or status == 0
            found = resume(here)
            assert found in (before, step), found
            done["kills"] += killed
            done["left the new one"] += killed and found == step
            saver = checkpoint.Saver(here, KEEP)  # and it goes on
            save(saver, 7)
            assert resume(here) == 7
    return done


# ---- after every operation of a whole run ----


def kill_whole_runs(folder, _):
    """A run dies after each operation from its third step on, and another goes on from there."""
    from tests.test_disk import begin, replace_training

    replace_training(setattr)
    done = Counter()
    number, killed = 0, True
    while killed:
        number += 1
        here = folder / str(number)

        def begin_it(here=here, number=number):
            def kill(count, name, args):
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            for step in begin(here, max_iters=5):
                if step.iter == 3:
                    watch(kill)

        def end_it(here=here):
            run = begin(here, resume=True, max_iters=5)
            assert run.iter_num in (2, 3, 4, 5)
            assert (run.model.wpe.weight.numpy() == run.iter_num).all()
            for step in run:
                assert not [notice for notice in step.notices if "damaged" in notice]
            assert [row["iter"] for row in run.history] == [1, 2, 3, 4, 5]
            assert resume_run(here) == 5

        _, status = os.waitpid(child(begin_it), 0)
        killed = os.WIFSIGNALED(status)
        assert killed or status == 0
        done["kills"] += killed
        _, status = os.waitpid(child(end_it), 0)
        assert status == 0, number
    return done


def resume_run(folder):
    path, problems = checkpoint.newest_good(folder)
    assert problems == []
    return checkpoint.read_meta(path).iter_num


if __name__ == "__main__":
    kind, count = sys.argv[2], int(sys.argv[3])
    place = Path(sys.argv[1])
    kinds = {
        "random": kill_at_random,
        "operations": kill_after_each_operation,
        "runs": kill_whole_runs,
    }
    result = kinds[kind](place, count)
    assert kind == "runs" or "tinygrad" not in sys.modules
    print(json.dumps(result))
