"""``tinygpt make-chats`` and ``tinygpt eval-chat``: questions, and how well a model answers."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.cli.console import command, say, show_json
from tinygpt.cli.flags import Count, Switch
from tinygpt.errors import DataError, UsageError

if TYPE_CHECKING:
    from tinygpt.generation.grading import Task


def make_chats(
    out: Path, /, *, held_out: Path | None = None, count: Count = 50_000, seed: int = 1
) -> None:
    """Write questions with short answers that a small model can learn, and a part to test it on.

    Sums of two-digit numbers, copies, reversals, facts of made-up people, questions on Python. A
    fifth of the conversations have several of them, turn by turn. No question of the held-out part
    is in the other one.

    Parameters
    ----------
    out
        JSONL file to write, which must be missing.
    held_out
        File of the questions that are kept for eval-chat. [default: beside it, NAME-held-out.jsonl]
    count
        Conversations to train on; a tenth as many questions, at most, are held out.
    seed
        Which questions; the same number makes the same files.
    """
    import random
    from itertools import islice

    from tinygpt.files.atomic import replacing
    from tinygpt.files.strict_json import to_json
    from tinygpt.text.chat.exercises import TURNS, conversations, exercises, record

    beside = held_out or out.with_name(f"{out.stem}-held-out{out.suffix or '.jsonl'}")
    for path in (out, beside):
        if path.exists():
            raise UsageError(f"{path} is there already, and nothing is overwritten. Give another.")
    trained = conversations(exercises(seed, TURNS[1] * count), seed)
    tested = list(dict.fromkeys(exercises(seed, max(1, count // 10), held_out=True)))
    random.Random(seed).shuffle(tested)  # kinds with few questions come first
    for path, talks in ((out, islice(trained, count)), (beside, conversations(tested, seed))):
        with replacing(path) as file:
            for talk in talks:
                file.write(to_json(record(talk), unicode=True).encode() + b"\n")
    say(f"{out}: {count:,} conversations; {beside}: {len(tested):,} questions that are held out")
    say(f"next: {command('train', out, '--minutes', 10, '--eval-chats', beside)}")


def eval_chat(
    run: Path,
    data: Path,
    /,
    *,
    max_tokens: Count = 64,
    limit: Count | None = None,
    show: int = 0,
    tokenizer: str | None = None,
    json: Switch = False,
) -> None:
    """Ask a model questions, and count the answers that are exactly right, by kind.

    Every answer of a conversation is asked for, with the turns before it as the file has them. Also
    the share of answers that end by themselves, and of those that go on to speak for the user.

    Parameters
    ----------
    run
        Run folder, of which the best checkpoint is taken, or a checkpoint.
    data
        JSONL file of conversations; a field "kind" groups them, or is a list of one kind an answer.
    max_tokens
        Tokens of an answer, at most.
    limit
        Questions that are asked: the first so many. [default: all]
    show
        Wrong answers to show.
    tokenizer
        gpt2, byte or a saved tokenizer, for a checkpoint that holds none.
    json
        Print the result as JSON.
    """
    from tinygpt.cli.loading import load_model
    from tinygpt.generation.grading import Score, scores

    tasks = read_tasks(data)[:limit]
    model, own = load_model(run, tokenizer=tokenizer)
    by_kind: dict[str, Score] = defaultdict(Score)
    later, total = Score(), Score()
    for task, answer in scores(model.decoder, own, tasks, max_tokens):
        for score in (by_kind[task.kind], total, *([later] if task.later else [])):
            score.add(answer, task.wanted)
        if show > 0 and answer.text.strip() != task.wanted.strip():
            show -= 1
            asked = task.messages[-1]["content"]
            say(f"{task.kind}: {asked!r} -> {answer.text!r}, wanted {task.wanted!r}")
    found: dict[str, Any] = {kind: score.to_dict() for kind, score in sorted(by_kind.items())}
    if json:
        show_json({"kinds": found, "later_turns": later.to_dict(), "total": total.to_dict()})
        return
    print(f"{'kind':<12}{'questions':>10}{'exact':>8}{'ended':>8}{'for user':>10}")
    last = {"later turns": later} if later.asked else {}
    found |= {name: score.to_dict() for name, score in (*last.items(), ("total", total))}
    for kind, row in found.items():
        print(
            f"{kind[:11]:<12}{row['questions']:>10,}{row['exact']:>8.1%}{row['ended']:>8.1%}"
            f"{row['spoke_for_user']:>10.1%}"
        )


def read_tasks(data: Path) -> list[Task]:
    """A task for each answer in a file. UsageError or DataError if it holds no conversations."""
    from tinygpt.generation.grading import tasks_of
    from tinygpt.text.chat.conversations import form_in, read_records

    if not data.is_file():
        raise UsageError(f"There is no file {str(data)!r}. Give a JSONL file of conversations.")
    if form_in(data) is None:
        raise DataError(f"{data} holds no conversations. Try: {command('make-chats', 'OUT.jsonl')}")
    return [
        task
        for record, messages in read_records(data)
        for task in tasks_of(record.get("kind", "all"), messages)
    ]
