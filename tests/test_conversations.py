"""Learning from conversations: what is read, what the loss counts, what a model then answers."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor

from tinygpt import GPT, GPTConfig, SampleConfig, TrainConfig
from tinygpt.api import train
from tinygpt.cli import main
from tinygpt.errors import DataError, UsageError
from tinygpt.generation.decoder import Decoder
from tinygpt.generation.generate import generate_tokens
from tinygpt.generation.grading import QUESTIONS, Exam, Score, Task, scores, tasks_of
from tinygpt.kernels.loss.fused import loss
from tinygpt.runs.changes import differences
from tinygpt.runs.checkpoint import Meta
from tinygpt.runs.run import TrainingRun
from tinygpt.text.batches import batch, split
from tinygpt.text.chat.conversations import checked, read_conversations
from tinygpt.text.chat.exercises import conversations, exercises, record
from tinygpt.text.chat.packing import Conversations, report, tokens_of_conversations
from tinygpt.text.chat.template import MARKED, PLAIN, template_of
from tinygpt.text.corpus import open_corpus
from tinygpt.text.mix import Mix
from tinygpt.text.sources import with_template_for
from tinygpt.text.tokenizers import END, MARKERS, ByteTokenizer
from tinygpt.text.tokens import bytes_per_token, data_fingerprint
from tinygpt.training.evaluation import measure
from tinygpt.training.optim import make_optimizer
from tinygpt.training.step import evaluate, make_evaluate, make_train_step

T = 64
TOKENIZER = ByteTokenizer((END, *MARKERS))
SHAPE = GPTConfig(
    vocab_size=TOKENIZER.vocab_size, block_size=T, n_layer=1, n_head=2, n_embd=16, dropout=0.0
)
ASKED = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


def made(count: int = 60, template: Any = MARKED) -> Conversations:
    plain = [e for e in exercises(1, count) if e.kind != "python"]
    chats = [record([e])["messages"] for e in plain]
    return tokens_of_conversations(chats, TOKENIZER, template)  # type: ignore[arg-type]


def written(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# Reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"messages": ASKED},
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in ASKED]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"instruction": "Why?", "input": "", "output": "So."},
        {"prompt": "Why?", "completion": "So."},
    ],
)
def test_each_form_is_recognised(tmp_path: Path, record: dict[str, Any]) -> None:
    path = written(tmp_path / "a.jsonl", record, record)
    corpus = open_corpus(path)
    assert corpus.conversations is not None
    assert list(corpus.conversations()) == [ASKED, ASKED]
    assert "".join(corpus.pieces()) == "Why?\nSo.\n" * 2


def test_records_with_texts_are_documents_as_before(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"text": "Once", "prompt": "a", "completion": "b"})
    assert open_corpus(path).conversations is None


SHAREGPT = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_one_list_is_read_as_lines_are(tmp_path: Path, name: str, indent: int | None) -> None:
    long = {
        "conversations": [{"from": "human", "value": "語" * 99_999}, *SHAREGPT["conversations"]]
    }
    long["conversations"].pop(1)
    content = json.dumps([SHAREGPT, long, SHAREGPT], indent=indent).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    corpus = open_corpus(tmp_path / name)
    assert corpus.conversations is not None and "ShareGPT's" in corpus.description
    first, second, third = corpus.conversations()
    assert first == third == ASKED and second[0]["content"] == "語" * 99_999


def test_a_folder_of_conversations_is_read_file_by_file(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", SHAREGPT, SHAREGPT)
    (tmp_path / "b.json").write_text(json.dumps([{"prompt": "Why?", "completion": "So."}]))
    corpus = open_corpus(tmp_path, glob="**/*.json*")
    assert corpus.conversations is not None and list(corpus.conversations()) == [ASKED] * 3
    (tmp_path / "c.jsonl").write_text('{"text": "no"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl, line 1 is no conversation"):
        list(_opened(tmp_path))


def _opened(folder: Path) -> Any:
    found = open_corpus(folder, glob="**/*.json*").conversations
    assert found is not None
    return found()


def test_other_json_is_text_as_before(tmp_path: Path) -> None:
    for content in ("[]", "[1, 2]", '{"a":\n1}', '[{"text": "a"}]', "[" * 100_000, "[[1, x"):
        (tmp_path / "a.json").write_text(content)
        corpus = open_corpus(tmp_path / "a.json")
        assert corpus.conversations is None and "".join(corpus.pieces()) == content


def test_what_nothing_is_learned_from_is_context_and_said(tmp_path: Path) -> None:
    said = [("system", "S"), ("gpt", "Hello."), ("human", "Why?"), ("gpt", "So.")]
    record = {"conversations": [{"from": role, "value": text} for role, text in said]}
    [opened] = read_conversations(written(tmp_path / "a.jsonl", record))
    assert [message.get("weight") for message in opened] == [None, 0, None, None]
    weighed = [*({**m, "weight": 0} if m["role"] == "assistant" else m for m in ASKED), *ASKED]
    [own] = read_conversations(written(tmp_path / "b.jsonl", {"messages": weighed}))
    for template, end in ((MARKED, "So.<|end|>"), (PLAIN, " So.\n\nUser:")):
        tokens = tokens_of_conversations([opened, own], TOKENIZER, template)
        assert TOKENIZER.decode(tokens.ids[tokens.counted]) == end * 2
        lines = report(tokens.split(0.5)[1], 128)  # the second
        assert "1 answers" in lines[0] and "context, from which nothing is learned: 1 " in lines[1]
    assert [task.wanted for task in tasks_of("a", opened)] == ["So."]


def one_message(**message: Any) -> str:
    return json.dumps({"messages": [message]})


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("{}", "is no conversation"),
        ("7", "is no conversation"),
        ("{no", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"messages": ' * 100_000, "is not JSON"),
        ('{"messages": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"messages": 1e999}', "the messages are float, wanted a list"),
        ('{"messages": [{"role": ' + "[" * 400 + "]" * 400 + "}]}", "has the role"),
        ('{"conversations": [{"from": ' + "[" * 400 + "]" * 400 + "}]}", "of the form ShareGPT"),
        (one_message(role="\ud800", content=""), "has the role"),
        (one_message(role="user", content="\ud800"), "lone surrogate"),
        (one_message(role="assistant", content="a", weight=2), "the weight 2, wanted 0 or 1"),
        (one_message(role="assistant", content="a", weight=0), "no answer to learn from"),
    ],
)
@pytest.mark.parametrize("kind", ["item", "line"])
def test_hostile_records_are_one_clear_line(
    tmp_path: Path, second: str, said: str, kind: str
) -> None:
    first, path = json.dumps({"messages": ASKED}), tmp_path / "a.json"
    path.write_text(f"[{first}, {second}]" if kind == "item" else f"{first}\n{second}\n")
    message = refused(path)
    assert f"{kind} 2" in message and said in message
    assert len(message) < 600 and message.isprintable()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[{} 7]", "behind item 1, is not JSON: '7' stands where"),
        ("[{}", "behind item 1, is not JSON: '' stands where"),
        ("[{},]", "item 2 is not JSON"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content.replace("{}", json.dumps({"messages": ASKED})))
    assert said in refused(path)


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_conversations(path))
    return str(caught.value)


def test_token_files_of_conversations_are_refused(tmp_path: Path, capsys: Any) -> None:
    path = written(tmp_path / "a.jsonl", {"messages": ASKED})
    assert main(["tokenize", str(path), "--out", str(tmp_path / "t"), "--tokenizer", "byte"]) == 2
    assert "do not keep which tokens are answers" in capsys.readouterr().err


def of(*roles: str, content: str = "x") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role in roles]}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (of("user", "user", "assistant"), "message 2 is of the user"),
        (of("assistant"), "message 1 is of the assistant"),
        (of("user", "assistant", "system"), "message 3 is of the system"),
        (of("user"), "there is no answer"),
        (of("user", "assistant", content=" "), "is empty"),
        (of("user", "tool"), "has the role"),
        (of(), "is empty"),
        ({"messages": "Hello"}, "wanted a list"),
        ({"messages": [{"role": "user", "content": 3}]}, "wanted a text"),
        ({"prompt": "a", "completion": "b"}, "of the form prompt and completion"),
        ({"question": "a"}, "is no conversation"),
    ],
)
def test_the_first_bad_line_is_named(tmp_path: Path, record: object, said: str) -> None:
    path = written(tmp_path / "a.jsonl", {"messages": ASKED}, record)
    with pytest.raises(DataError, match="line 2") as caught:
        list(read_conversations(path))
    assert said in str(caught.value)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"messages": ASKED})
    path.write_text(path.read_text() + "\n{no\n")
    with pytest.raises(DataError, match="line 3 is not JSON"):
        list(read_conversations(path))


# Packing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_an_epoch_has_each_answer_once_as_a_target(template: Any) -> None:
    tokens = made(template=template)
    packed = tokens.packed(T)
    assert not packed.cut and not packed.left_out
    rows = len(packed.ids)
    x, y = batch(tokens, 0, 5, rows, T)
    assert sorted(y[y >= 0]) == sorted(tokens.ids[tokens.counted])
    assert sorted(map(tuple, x)) == sorted(map(tuple, packed.ids[:, :-1]))
    assert not tokens.counted[[0, *tokens.ended[:-1]]].any()  # no answer begins a conversation
    first, second = (batch(tokens, step, 5, rows // 2, T)[0] for step in (0, 1))
    np.testing.assert_array_equal(x[: rows // 2], first)
    np.testing.assert_array_equal(x[rows // 2 : rows // 2 * 2], second)


def test_targets_follow_their_inputs() -> None:
    tokens = tokens_of_conversations([ASKED], TOKENIZER, MARKED)
    x, y = batch(tokens, 0, 0, 1, T)
    ids = MARKED.render(TOKENIZER, ASKED).ids
    np.testing.assert_array_equal(x[0, : len(ids)], ids)
    assert TOKENIZER.decode(y[y >= 0]) == "So.<|end|>"
    assert y[0, len(ids) - 2] == TOKENIZER.special_id("<|end|>")


def test_what_is_too_long_is_cut_or_left_out_and_said() -> None:
    def ask(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    chats = [ask("a", "b"), ask("a", "b" * 99), ask("a" * 99, "b")]
    tokens = tokens_of_conversations(chats, TOKENIZER, MARKED)
    packed = tokens.packed(T)
    assert (packed.cut, packed.left_out) == (1, 1)
    assert any("1 lose their end, and 1 are left out" in line for line in report(tokens, T))
    with pytest.raises(DataError, match="block_size"):
        tokens_of_conversations(chats[2:], TOKENIZER, MARKED).packed(T)


def test_conversations_are_split_whole() -> None:
    tokens = made(20)
    tokens = made(20)
    training, held_out = split(tokens, 0.25, T)
    assert isinstance(training, Conversations) and isinstance(held_out, Conversations)
    assert training.count == int(0.75 * tokens.count)
    assert training.count + held_out.count == tokens.count
    np.testing.assert_array_equal(np.concatenate([training.ids, held_out.ids]), tokens.ids)
    with pytest.raises(DataError, match="too few"):
        split(made(1), 0.1, T)


def test_what_is_learned_belongs_to_the_fingerprint_of_the_data() -> None:
    tokens = made(5)
    other = Conversations(tokens.ids, ~tokens.counted, tokens.ended, tokens.answers, tokens.context)
    assert data_fingerprint(tokens) == data_fingerprint(made(5)) != data_fingerprint(other)


def test_a_mix_has_conversations_and_text_by_their_shares() -> None:
    text = np.full(4000, 7, np.uint16)
    mix = Mix({"chat": made(), "text": text}, {"chat": 0.25, "text": 0.75})
    training, held_out = split(mix, 0.1, T)
    assert isinstance(held_out, Mix)
    x, y = batch(training, 0, 1, 8, T)
    plain = (x == 7).all(1)
    assert plain.sum() == 6 and (y[plain] == 7).all() and (y[~plain] < 0).any(1).all()


# The loss ---------------------------------------------------------------------------------------


def test_the_gradient_of_what_is_not_counted_is_exactly_zero() -> None:
    rng = np.random.default_rng(0)
    x, weight = Tensor(rng.normal(size=(64, 16)).astype("f4")), rng.normal(size=(300, 16))
    y = rng.integers(0, 300, 64)
    y[::3] = -1
    dx = loss(x, Tensor(weight.astype("f4")), Tensor(y), gradient=True).gradient(x)[0].numpy()
    assert (dx[y < 0] == 0).all() and (dx[y >= 0] != 0).any(1).all()


def test_loss_and_gradients_are_those_of_transformers_with_labels_of_minus_100() -> None:
    torch = pytest.importorskip("torch", reason="needs the extra 'oracle': transformers and torch")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'oracle'")
    model = GPT(SHAPE)
    c = SHAPE
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=T, n_embd=c.n_embd, n_layer=c.n_layer,
            n_head=c.n_head, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
            activation_function="gelu_new",
        )
    )  # fmt: skip
    own = {name: p.numpy() for name, p in model.parameters().items()}
    state = theirs.state_dict()
    for name in state:
        short = name.removeprefix("transformer.")
        if short in own:
            turned = own[short].T if state[name].shape != own[short].shape else own[short]
            # Conv1D has its weights the other way round, square ones too
            turned = own[short].T if short.endswith("c_proj.weight") else turned
            state[name].copy_(torch.tensor(np.ascontiguousarray(turned)))
        elif short != "lm_head.weight":
            state[name].zero_()  # a bias that the model has not
    x, y = batch(made(), 0, 0, 4, T)
    ids = torch.tensor(np.concatenate([x, y[:, -1:].clip(0)], 1)[:, :T], dtype=torch.long)
    labels = torch.full((4, T), -100)
    labels[:, 1:] = torch.tensor(np.where(y < 0, -100, y)[:, :-1])
    y[:, -1] = -1  # what transformers shifts out of the window
    found = model.loss(Tensor(x), Tensor(y))
    wanted = theirs(ids, labels=labels).loss
    wanted.backward()
    # before the loss is read: a kernel whose output is there has no gradient any more
    dx = found.gradient(model.parameters()["wpe.weight"])[0].realize(found).numpy()
    assert found.item() == pytest.approx(wanted.item(), abs=1e-4)
    np.testing.assert_allclose(dx, theirs.transformer.wpe.weight.grad.numpy(), atol=1e-4)


def stepped(**given: Any) -> tuple[float, np.ndarray]:
    """The loss of a step on four blocks with very different answers, and a weight after it."""
    model = GPT(SHAPE)
    config = TrainConfig(max_iters=1, batch_size=4 // given.get("grad_accum_steps", 1), **given)
    step = make_train_step(model, make_optimizer(model.trainable(), config), config)
    x, y = batch(made(), 0, 0, 4, T)
    y[0], y[1, 3:] = -1, -1
    A = config.grad_accum_steps
    outcome = step(x.reshape(A, -1, T), y.reshape(A, -1, T), 0.01, (0, 0))
    return outcome.norm, np.array([outcome.loss, *model.wpe.weight.numpy().ravel()])


@pytest.mark.parametrize(
    "given", [{"grad_accum_steps": 2}, {"grad_accum_steps": 4}, {"devices": 2}]
)
def test_a_step_counts_each_answer_alike_however_it_is_cut(given: dict[str, Any]) -> None:
    (norm, whole), (cut_norm, cut) = stepped(), stepped(**given)
    assert cut_norm == pytest.approx(norm, rel=1e-4)
    np.testing.assert_allclose(cut[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(cut[1:], whole[1:], atol=2e-4)


def test_evaluations_count_answers_only() -> None:
    model, tokens = GPT(SHAPE), made(30)
    judge = make_evaluate(model)
    rows = len(tokens.packed(T).ids)
    whole = judge(*batch(tokens, 0, 0x5EED, rows, T))
    assert evaluate(judge, tokens, rows, 1, T) == pytest.approx(whole, rel=1e-5)
    found = measure(model, tokens, TOKENIZER, batch_size=4)
    assert found.tokens == tokens.counted.sum()
    assert found.loss == pytest.approx(whole, rel=1e-5)
    per_token = bytes_per_token(tokens, TOKENIZER)
    assert per_token and found.n_bytes == round(per_token * found.tokens)


@pytest.mark.parametrize("accum", [1, 2])
def test_a_run_on_conversations_goes_on_bit_for_bit(tmp_path: Path, accum: int) -> None:
    def run(name: str, steps: int, **given: Any) -> np.ndarray:
        model = GPT(SHAPE)
        config = TrainConfig(
            max_iters=steps, batch_size=2, grad_accum_steps=accum, eval_interval=2, eval_iters=2,
            warmup_steps=1, decay="constant", checkpoint_interval=2,
        )  # fmt: skip
        train(
            model, config, made(), made(9), tokenizer=TOKENIZER, out_dir=tmp_path / name,
            show=False, **given,
        )  # fmt: skip
        return model.wte.weight.numpy()

    whole = run("whole", 4)
    run("parts", 2)
    again = run("parts", 4, resume=True, allow_change=("max_iters",))
    np.testing.assert_array_equal(whole, again)


# Answers ----------------------------------------------------------------------------------------


def test_held_out_questions_are_not_trained_on_and_files_are_the_same_again() -> None:
    trained, tested = list(exercises(3, 9000)), list(exercises(3, 300, held_out=True))
    assert trained == list(exercises(3, 9000))
    assert not {e.question for e in trained} & {e.question for e in tested}
    assert {e.kind for e in trained} == {e.kind for e in tested}
    for e in trained:
        if e.kind == "add":
            a, b = e.question.rstrip("=").split("+")
            assert int(e.answer) == int(a) + int(b)
        if e.kind == "reverse":
            assert e.question == f"reverse {e.answer[::-1]}"
    known = {e.answer for e in trained if e.kind in ("fact", "python")}
    assert {e.answer for e in tested if e.kind in ("fact", "python")} <= known


def test_each_kind_has_enough_questions_that_are_held_out() -> None:
    counts = Counter(e.kind for e in set(exercises(1, 5000, held_out=True)))
    assert min(counts.values()) >= 50, counts


def test_some_conversations_have_several_turns_of_which_none_gives_another_away() -> None:
    made = list(exercises(3, 1000))
    talks = list(conversations(made, 3))
    assert [e for talk in talks for e in talk] == made
    assert talks == list(conversations(made, 3))
    lengths = Counter(map(len, talks))
    assert set(lengths) == {1, 2, 3, 4}
    assert 0.1 < 1 - lengths[1] / len(talks) < 0.3
    assert all(len({e.answer for e in talk}) == len(talk) for talk in talks)
    longest = max(talks, key=len)
    kinds = record(longest)["kind"]
    assert kinds == [e.kind for e in longest]
    tasks = list(tasks_of(kinds, checked_messages(record(longest))))
    assert [(t.kind, t.messages[-1]["content"], t.wanted) for t in tasks] == list(longest)
    assert [t.later for t in tasks] == [False, True, True, True]


def checked_messages(of: dict[str, Any]) -> list[dict[str, str]]:
    return checked([(m["role"], m["content"], 1) for m in of["messages"]])


def test_answers_are_scored_by_what_they_say_and_how_they_end() -> None:
    said = {
        "a": [*b"yes", TOKENIZER.special_id("<|end|>")],
        "bb": [*b"yes", TOKENIZER.special_id("<|user|>")],
        "ccc": [*b"yes"] * 2,
    }

    class Speaker(Decoder):
        """Says what stands above, in place of what a model would."""

        def next_logits(self, sequences: Any) -> Any:
            out = np.zeros((len(sequences), TOKENIZER.vocab_size), np.float32)
            for row, sequence in zip(out, sequences, strict=True):
                question = "".join(chr(i) for i in sequence.ids if chr(i) in "abc")
                spoken = len(sequence.ids) - len(question) - 3
                row[said[question][spoken]] = 1
            return out

    tasks = [Task(q, [{"role": "user", "content": q}], "yes") for q in said]
    found = {t.kind: answer for t, answer in scores(Speaker(GPT(SHAPE)), TOKENIZER, tasks, 6)}
    assert (found["a"].text, found["a"].ended, found["a"].for_user) == ("yes", True, False)
    assert (found["bb"].ended, found["bb"].for_user) == (False, True)
    assert (found["ccc"].text, found["ccc"].ended) == ("yesyes", False)
    total = Score()
    for task in tasks:
        total.add(found[task.kind], task.wanted)
    assert total.to_dict() == {
        "questions": 3, "exact": 2 / 3, "ended": 1 / 3, "spoke_for_user": 1 / 3,
    }  # fmt: skip


def test_answers_together_are_those_that_each_question_gets_alone() -> None:
    model = GPT(SHAPE, seed=3)
    tasks = [Task("x", [{"role": "user", "content": "a" * n}], "b") for n in (3, 9, 1, 5)]
    for task, answer in scores(model.decoder, TOKENIZER, tasks, 5):
        prompt = MARKED.render(TOKENIZER, task.messages, answer=True).ids.tolist()
        ends = [*MARKED.stop_ids(TOKENIZER), TOKENIZER.special_id(END)]
        alone = generate_tokens(model, [prompt], 5, SampleConfig(temperature=0), ends=ends)
        ids = [int(i[0]) for i in alone]
        assert answer.text == TOKENIZER.decode(ids[:-1] if ids[-1] in ends else ids)


def test_an_exam_has_all_kinds_and_short_answers_only() -> None:
    asked = [{"role": "user", "content": "a"}]
    tasks = [Task("a", asked, "b")] * 100 + [Task("b", asked, "b")] * 5
    found = Exam([*tasks, Task("c", asked, "b" * 40)], TOKENIZER).tasks
    assert Counter(t.kind for t in found) == {"a": QUESTIONS - 5, "b": 5}
    with pytest.raises(DataError, match="at most 32 tokens"):
        Exam([Task("c", asked, "b" * 40)], TOKENIZER)


def test_an_exam_changes_nothing_in_training(tmp_path: Path) -> None:
    tasks = [Task(e.kind, record([e])["messages"][:1], e.answer) for e in exercises(1, 3)]  # type: ignore[index]

    def trained(exam: Exam | None) -> tuple[np.ndarray, list[Any]]:
        model = GPT(SHAPE)
        config = TrainConfig(max_iters=3, batch_size=2, eval_interval=1, eval_iters=2)
        run = TrainingRun(model, config, made(), made(9), tokenizer=TOKENIZER, exam=exam)
        marks = [step.exact for step in run]
        return model.wte.weight.numpy(), marks

    (plain, none), (examined, marks) = trained(None), trained(Exam(tasks, TOKENIZER))
    np.testing.assert_array_equal(plain, examined)
    assert none == [None] * 3
    for found in (marks[0], marks[-1]):  # others only where there is time
        assert found.keys() == {*(t.kind for t in tasks), "total"}


def test_every_answer_of_a_conversation_is_a_task() -> None:
    tasks = list(tasks_of("x", [*ASKED, *ASKED]))
    assert [len(t.messages) for t in tasks] == [1, 3]
    assert [t.kind for t in tasks] == ["x", "x"]
    wrong = list(tasks_of(["one kind for two answers"], [*ASKED, *ASKED]))
    assert len({t.kind for t in wrong}) == 1


def test_the_commands_make_learn_and_examine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["make-chats", "c.jsonl", "--count", "200"]) == 0
    assert main(["make-chats", "c.jsonl"]) == 2
    shape = [
        "--n-layer",
        "1",
        "--n-head",
        "2",
        "--n-embd",
        "16",
        "--block-size",
        "64",
        "--batch-size",
        "2",
    ]
    steps = ["--max-iters", "2", "--eval-interval", "1", "--eval-iters", "1", "--tokenizer", "byte"]
    capsys.readouterr()
    steps += ["--eval-chats", "c-held-out.jsonl"]
    assert main(["train", "c.jsonl", "--out", "r", *shape, *steps]) == 0
    rows = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["exact"] == rows[-1]["exact_by_kind"]["total"] == 0
    err = capsys.readouterr().err
    assert re.search(r"180 with 2\d\d answers", err) and "the loss counts only these" in err
    assert "exact answers 0% (add 0%" in err
    assert "Talk to it:\n  tinygpt chat r" in err
    assert main(["eval-chat", "r", "c-held-out.jsonl", "--limit", "3", "--max-tokens", "4"]) == 0
    assert "total" in capsys.readouterr().out
    assert main(["eval", "r", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 0
    tuned = ["--init", "r", "--lora-rank", "2", "--max-iters", "1", "--batch-size", "2"]
    Path("t.txt").write_text("Once upon a time. " * 200)
    assert main(["train", "--mix", "c.jsonl=0.5,t.txt=0.5", "--out", "m", *tuned]) == 0
    assert main(["eval-chat", "r", "t.txt"]) == 1
    assert "holds no conversations" in capsys.readouterr().err


def test_gpt2_without_markers_learns_from_plain_roles(tmp_path: Path) -> None:
    tokens = tokens_of_conversations([ASKED], ByteTokenizer(), PLAIN)
    _, y = batch(tokens, 0, 0, 1, 64)
    assert ByteTokenizer().decode(y[y >= 0]) == " So.\n\nUser:"


def test_a_vocabulary_without_markers_keeps_the_template_that_was_learned(tmp_path: Path) -> None:
    corpora = [open_corpus(written(tmp_path / "a.jsonl", {"messages": ASKED}))]
    kept = with_template_for(ByteTokenizer(), corpora)
    assert template_of(kept) == PLAIN and with_template_for(TOKENIZER, corpora) is TOKENIZER
    (tmp_path / "plain.txt").write_text("Once.")
    assert (
        with_template_for(ByteTokenizer(), [open_corpus(tmp_path / "plain.txt")]).template is None
    )
    before = Meta(1, SHAPE, tokenizer=ByteTokenizer().to_dict())  # a run of before this was kept
    assert differences(before, SHAPE, TrainConfig(), {}, kept.to_dict()) == []


def test_a_stride_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--stride"):
        measure(GPT(SHAPE), made(), TOKENIZER, stride=4)
