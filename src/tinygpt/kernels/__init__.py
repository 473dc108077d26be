"""What the model computes with: the operations, each with a fast kernel and a plain twin.

One file is one operation: derivation, plain twin, fast kernel, gradient. `dispatch` decides which
way an operation is computed; within ``plain()`` every one goes to its twin, for tests and
benchmarks that compare the two. `phases` is the language of the kernels and `loops` its idioms;
`check` compares them with float64 on the device at hand.

Shapes use the field's letters: B batch, T positions, C width, H heads, D head size, V vocabulary.
"""

from tinygpt.kernels.adamw import adamw_update as adamw_update
from tinygpt.kernels.adamw_shares import adamw_follow as adamw_follow
from tinygpt.kernels.adamw_shares import adamw_numbers as adamw_numbers
from tinygpt.kernels.adamw_shares import squared_sums as squared_sums
from tinygpt.kernels.attention import self_attention as self_attention
from tinygpt.kernels.attention.rows import keep as keep
from tinygpt.kernels.attention.rows import rows_attention as rows_attention
from tinygpt.kernels.dispatch import plain as plain
from tinygpt.kernels.dispatch import use as use
from tinygpt.kernels.dropout import dropout as dropout
from tinygpt.kernels.dropout import next_key as next_key
from tinygpt.kernels.embedding import embedding as embedding
from tinygpt.kernels.gelu import gelu as gelu
from tinygpt.kernels.linear import linear as linear
from tinygpt.kernels.loss.cross_entropy import cross_entropy as cross_entropy
from tinygpt.kernels.loss.fused import loss as loss
from tinygpt.kernels.muon import muon_update as muon_update
from tinygpt.kernels.nibbles import int4_linear as int4_linear
from tinygpt.kernels.norm import layer_norm as layer_norm
from tinygpt.kernels.quantized import quantized_linear as quantized_linear
