"""What one thread switches is not switched for another, nor left behind by it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor
from tinygrad.helpers import TRAINING

from tinygpt import kernels
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.errors import UsageError
from tinygpt.generation.decoder import Decoder, Sequence
from tinygpt.kernels import dispatch, phases
from tinygpt.machine.gradients import all_gradients_taken
from tinygpt.model.transformer import Transformer
from tinygpt.training import optim
from tinygpt.training.step import make_evaluate, make_train_step

WAIT = 20
ONE = TrainConfig(batch_size=1)
MODEL = Transformer(GPTConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=8))


def crossing(
    block: Callable[[], AbstractContextManager[None]], look: Callable[[], object]
) -> list[object]:
    """Two threads enter a block, and leave it in the order in which they entered.

    -> what each sees within its block when the other has entered, the second when the first has
    left, and a third thread meanwhile; and what is seen at the end.
    """
    seen: dict[str, object] = {}
    entered, left, may_leave = threading.Event(), threading.Event(), threading.Event()

    def second() -> None:
        with block():
            entered.set()
            may_leave.wait(WAIT)
            left.wait(WAIT)
            seen["second"] = look()

    other = threading.Thread(target=second)
    with block():
        other.start()
        entered.wait(WAIT)
        seen["first"] = look()
        third = threading.Thread(target=lambda: seen.update(third=look()))
        third.start()
        third.join(WAIT)
    left.set()
    may_leave.set()
    other.join(WAIT)
    return [seen["first"], seen["second"], seen["third"], look()]


def test_plain_twins_are_those_of_one_thread() -> None:
    assert crossing(kernels.plain, dispatch._way.get) == ["plain", "plain", "auto", "auto"]


def test_inference_and_evaluation_switch_no_mode_that_another_thread_could_see() -> None:
    seen = []

    class Watched(Transformer):
        def hidden(self, *given: Any, **named: Any) -> Tensor:
            seen.append(self.training)
            return super().hidden(*given, **named)

    ids = np.ones((1, 8), np.int32)
    for training in (True, False):
        model = Watched(MODEL.config).train(training)
        Decoder(model).next_logits([Sequence([1] * 8)])
        make_evaluate(model)(ids, ids)
        make_train_step(model, optim.make_optimizer(model.parameters(), ONE), ONE)(
            ids[None], ids[None], 0.1, (0, 0)
        )
        assert seen == [training] * 3 and model.training is training
        seen.clear()


def test_a_model_of_int8_weights_has_no_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODEL, "integers", "int8")
    with pytest.raises(UsageError, match="quantised"):
        MODEL.train()
    with pytest.raises(UsageError, match="quantised"):
        make_train_step(MODEL, optim.make_optimizer(MODEL.parameters(), ONE), ONE)


def test_gradients_are_let_go_by_the_block_of_their_own_thread() -> None:
    made: list[phases.Gradient] = []

    def look() -> object:
        made.append(phases.Gradient(lambda *_: (), 1))
        return made[-1].backward is not None

    assert crossing(all_gradients_taken, look) == [True] * 4
    first, third, second, last = made
    assert first.backward is None and second.backward is None
    assert third.backward is not None and last.backward is not None


def test_assignments_of_other_threads_know_no_condition() -> None:
    never = Tensor([False]).realize()
    found: dict[str, Any] = {}

    def assigned() -> list[float]:
        return Tensor([1.0]).contiguous().realize().assign(Tensor([2.0])).tolist()  # type: ignore[return-value]

    own = Tensor.assign
    with optim.assigning_only_if(never.reshape(())):
        found["here"] = assigned()
        other = threading.Thread(target=lambda: found.update(there=assigned()))
        other.start()
        other.join(WAIT)
    assert found == {"here": [1.0], "there": [2.0]} and Tensor.assign is own


def test_blocks_of_conditional_assignments_take_turns() -> None:
    """They change what is the process's: one that ends must not undo the other's beginning."""
    inside, order = threading.Event(), []
    yes = Tensor([True]).realize().reshape(())
    own = Tensor.assign

    def second() -> None:
        inside.set()
        with optim.assigning_only_if(yes):
            order.append("second")

    other = threading.Thread(target=second)
    with optim.assigning_only_if(yes):
        other.start()
        inside.wait(WAIT)
        other.join(0.05)
        order.append("first")
    other.join(WAIT)
    assert order == ["first", "second"] and Tensor.assign is own and not TRAINING
