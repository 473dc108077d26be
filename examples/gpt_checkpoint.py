"""Save a model with its optimizer, and go on from the file."""

from tinygrad.nn.optim import Adam
from tinygrad.nn.state import get_parameters

from gpt import GPT, GPTConfig

config = GPTConfig(block_size=64, vocab_size=50257, n_layer=4, n_head=4, n_embd=128)
model = GPT(config)
optimizer = Adam(get_parameters(model), lr=1e-3)
iter_num = 1000

model.save_checkpoint(iter_num, optimizer, "checkpoints")
iter_num = model.load_checkpoint("checkpoints/ckpt_1000.safetensors", optimizer)
print(f"Went on from step {iter_num}.")
