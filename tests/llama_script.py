"""What llama.cpp makes of a GGUF file, for test_gguf: FILE < request.json > answer.json.

It runs in another environment, with llama-cpp-python and without tinygpt.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np


def piece(model, token):
    """The bytes of a token; the method for it has room for 32 only."""
    buffer = ctypes.create_string_buffer(4096)
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    length = llama_cpp.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, False)
    assert length >= 0, token
    return buffer.raw[:length]


def main(path):
    request = json.load(sys.stdin)
    if "chats" in request:  # of texts with special tokens in them, ids alone are asked for
        vocabulary = llama_cpp.Llama(path, vocab_only=True, verbose=False)
        ids = [vocabulary.tokenize(t.encode(), False, True) for t in request["chats"]]
        json.dump({"ids": ids}, sys.stdout)
        return
    model = llama_cpp.Llama(
        path, n_ctx=request["block_size"], n_batch=512, n_threads=1, logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False,
    )  # fmt: skip
    ids = model.tokenize(request["text"].encode(), add_bos=False, special=False)
    tokens = list(request["prompt"])
    model.eval(tokens)
    logits = np.array(model.scores[: len(tokens)])
    for _ in range(request["count"]):
        tokens.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(tokens[-1:])
    answer = {
        "version": llama_cpp.__version__,
        "ids": ids,
        "same_text": b"".join([piece(model, i) for i in ids]) == request["text"].encode(),
        "logits": logits.tolist(),
        "tokens": tokens,
        "end": model.token_eos(),
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
