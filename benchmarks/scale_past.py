"""What `cost.py` foresees for machines that are not here: cards, a cluster, laptops at home.

The model is GPT-2 124M. What a machine like this one takes for a micro-batch and an update is
measured; cards and links are assumed: the constants below, in words in docs/scaling.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from cost import FLOAT, Cluster, Link, Plan, lost, memory

from tinygpt.config import PRESETS, GPTConfig
from tinygpt.config.weights import weights

GPT2 = GPTConfig(**PRESETS["gpt2"].model)
TENSORS = len(list(weights(GPT2)))
SIZE = FLOAT * GPT2.num_params()
"""Bytes of all gradients, in float32."""

CARD = 989e12 * 0.4
"""Operations a second: an H100's peak in bfloat16, of which 40 % are reached."""
CARD_MEMORY = 3.35e12
"""Bytes a second."""
SEQUENCES = 16
"""Of a card's micro-batch."""
UPDATE = 7 * FLOAT
"""Bytes that AdamW reads and writes for each parameter."""

NVLINK, PCIE = Link(10e-6, 450e9), Link(10e-6, 50e9)
FAST, SLOW = Link(50e-6, 1.25e9), Link(100e-6, 0.125e9)
"""Ethernet of 10 and of 1 Gbit/s."""
HOME = Link(30e-3, 2.5e6)
"""20 Mbit/s upwards."""
STAYS = 8 * 3600
"""Seconds after which a laptop leaves, on average."""


@dataclass(frozen=True)
class Measured:
    """GPT-2 124M on this machine, with all of its cores."""

    micro_batch: float
    """Seconds for 1 x 1024 tokens."""
    update: float


def operations() -> float:
    """Operations of a token, forward and backward: 6 for each weight of a product, attention's."""
    C, T, L, V = GPT2.n_embd, GPT2.block_size, GPT2.n_layer, GPT2.vocab_size
    return 6 * (12 * L * C * C + V * C) + 12 * L * C * T


def clusters(here: Measured) -> dict[str, tuple[Cluster, int]]:
    """What is foreseen, by its name, and the sequences of a micro-batch."""
    card = SEQUENCES * GPT2.block_size * operations() / CARD
    update = UPDATE * SIZE / FLOAT / CARD_MEMORY
    found = {}
    for name, link in (("NVLink", NVLINK), ("PCIe", PCIE)):
        first = Cluster(8, card, update, link, SIZE, tensors=TENSORS)
        shared = Cluster(8, card, update / 8, link, SIZE, tensors=TENSORS, shared=True)
        found[f"8 cards, {name}"] = first, SEQUENCES
        found[f"8 cards, {name}, `--shard-optimizer`"] = shared, SEQUENCES
    for name, link in (("10 Gbit/s", FAST), ("1 Gbit/s", SLOW)):
        machines = Cluster(64, here.micro_batch, here.update, link, SIZE, micro_batches=8)
        half = Cluster(64, here.micro_batch, here.update, link, SIZE / 2, micro_batches=8)
        found[f"64 machines, {name}"] = machines, 1
        found[f"64 machines, {name}, `--wire bfloat16`"] = half, 1
    for every in (None, 50, 500):
        name = f", `--sync-every {every}`" if every else ""
        home = Cluster(1024, here.micro_batch, here.update, HOME, SIZE, 1, every)
        found[f"1024 laptops at home{name}"] = home, 1
    return found


def table(here: Measured) -> list[str]:
    """A row of Markdown for each of them."""
    lines = [
        "| | a step | computing | update | exchange | tokens/s | bends at |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (cluster, sequences) in clusters(here).items():
        step, bend = cluster.step(), cluster.where_it_bends()
        tokens = cluster.machines * cluster.micro_batches * sequences * GPT2.block_size
        lines.append(
            f"| {name} | {seconds(step.seconds)} | {step.compute / step.seconds:.0%} "
            f"| {step.update / step.seconds:.0%} | {step.exchange / step.seconds:.0%} "
            f"| {rounded(tokens / step.seconds)} | {f'{bend:,}' if bend else 'never'} |"
        )
    return lines


def remarks(here: Measured) -> list[str]:
    """What follows for memory, and for laptops that leave."""
    home, _ = clusters(here)["1024 laptops at home, `--sync-every 500`"]
    exchange = home.link.exchange(home.machines, home.size)
    apart = Plan(1024, ranks=1024, sync_every=500)
    sizes = [memory(plan, SIZE) / 1e9 for plan in (Plan(1), Plan(512, ranks=64), apart)]
    return [
        f"- Measured here: {seconds(here.micro_batch)} for 1 x 1024 tokens of GPT-2 124M, "
        f"{seconds(here.update)} for an update.",
        f"- Without activations, a process by itself has {sizes[0]:.1f} GB of weights, moments and "
        f"sums, one of 64 machines with 8 micro-batches {sizes[1]:.1f} GB, and a laptop "
        f"{sizes[2]:.1f} GB.",
        f"- An exchange between 1024 laptops takes {seconds(exchange)}. If each leaves once in "
        f"{STAYS // 3600} hours, {lost(home.machines, exchange, STAYS):.0f} leave in that time, "
        f"and {lost(home.machines, 500 * home.step().seconds, STAYS):.0f} from one meeting to the "
        f"next.",
    ]  # fmt: skip


def seconds(value: float) -> str:
    """
    >>> seconds(0.0351), seconds(2.14), seconds(460)
    ('35 ms', '2.1 s', '460 s')
    """
    if value < 1:
        return f"{1000 * value:.0f} ms" if value >= 0.01 else f"{1000 * value:.1f} ms"
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"


def rounded(value: float) -> str:
    """Two digits.

    >>> rounded(23_456), rounded(1_234_567)
    ('23,000', '1,200,000')
    """
    return f"{float(f'{value:.1e}'):,.0f}"
