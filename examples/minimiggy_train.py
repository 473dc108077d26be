"""Train a GPT on a text, and save it."""

from minimiggy import GPT, BPETokenizer, GPTConfig, TrainConfig, train
from tinygpt.text.corpus import open_corpus

tokenizer = BPETokenizer()
train_data = tokenizer.encode("".join(open_corpus("auto").pieces()))

config = GPTConfig(block_size=64, vocab_size=50257, n_layer=4, n_head=4, n_embd=128)
train_config = TrainConfig(
    batch_size=8,
    learning_rate=1e-3,
    warmup_steps=100,
    max_iters=2000,
    eval_interval=100,
    eval_iters=20,
)
model = GPT(config)
result = train(model, train_config, train_data)

model.save_checkpoint(result.iter_num, result.optimizer, "checkpoints")
