"""Continue a prompt with the model that minimiggy_train.py saved."""

from tinygrad import Tensor

from minimiggy import BPETokenizer, load

tokenizer = BPETokenizer()
model, _ = load("checkpoints")

x = Tensor([tokenizer.encode("ROMEO:")], dtype="int32")
generated = model.generate(x, max_tokens=100)
print(tokenizer.decode(generated.numpy().flatten().tolist()))
