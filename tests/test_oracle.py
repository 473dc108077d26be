"""The numpy oracle against the real thing, and against itself."""

import numpy as np
import pytest

from tests.numpy_gpt2 import GPT2, AdamW

V, BLOCK, C, H, LAYERS = 13, 8, 16, 2, 2


def random_params(tied=True, bias=True, seed=0):
    rng = np.random.default_rng(seed)

    def norm(name):
        weights = {f"{name}.weight": rng.normal(1, 0.3, C)}
        return weights | ({f"{name}.bias": rng.normal(0, 0.3, C)} if bias else {})

    def linear(name, n_in, n_out):
        weights = {f"{name}.weight": rng.normal(0, 0.3, (n_out, n_in))}
        return weights | ({f"{name}.bias": rng.normal(0, 0.3, n_out)} if bias else {})

    params = {"wte.weight": rng.normal(0, 1, (V, C)), "wpe.weight": rng.normal(0, 1, (BLOCK, C))}
    for i in range(LAYERS):
        params |= norm(f"h.{i}.ln_1") | linear(f"h.{i}.attn.c_attn", C, 3 * C)
        params |= linear(f"h.{i}.attn.c_proj", C, C) | norm(f"h.{i}.ln_2")
        params |= linear(f"h.{i}.mlp.c_fc", C, 4 * C) | linear(f"h.{i}.mlp.c_proj", 4 * C, C)
    params |= norm("ln_f")
    return params if tied else params | {"lm_head.weight": rng.normal(0, 0.3, (V, C))}


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(5)
    return rng.integers(0, V, (3, BLOCK)), rng.integers(0, V, (3, BLOCK))


@pytest.mark.parametrize(("tied", "bias"), [(True, True), (False, False)])
def test_gradients_of_the_oracle_equal_central_differences(tied, bias, text):
    x, y = text
    y = np.where(y == 3, -1, y)  # some targets are left out
    oracle = GPT2(random_params(tied, bias), LAYERS, H)
    _, grads = oracle.loss_and_gradients(x, y)
    rng, h = np.random.default_rng(1), 1e-6
    for name, p in oracle.params.items():
        direction, saved = rng.normal(size=p.shape), p.copy()
        oracle.params[name] = saved + h * direction
        high = oracle.loss(x, y)
        oracle.params[name] = saved - h * direction
        low = oracle.loss(x, y)
        oracle.params[name] = saved
        np.testing.assert_allclose((grads[name] * direction).sum(), (high - low) / (2 * h), 1e-6)


def test_the_oracle_is_transformers_gpt2(text):
    torch = pytest.importorskip("torch", reason="needs the extra 'oracle': transformers and torch")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'oracle'")
    x, y = text
    params = random_params()
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=BLOCK, n_embd=C, n_layer=LAYERS, n_head=H,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).double()
    # their linear layers are Conv1D, which keeps its weights (in, out)
    turned = {
        f"transformer.{name}": torch.tensor(p.T.copy() if ".c_" in name and p.ndim == 2 else p)
        for name, p in params.items()
    }
    missing, unexpected = theirs.load_state_dict(turned, strict=False)
    assert missing == ["lm_head.weight"] and unexpected == []  # tied
    oracle = GPT2(params, LAYERS, H)
    logits = theirs(torch.tensor(x)).logits
    np.testing.assert_allclose(oracle.logits(x), logits.detach().numpy(), rtol=1e-9, atol=1e-9)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(y).flatten())
    loss.backward()
    ours, grads = oracle.loss_and_gradients(x, y)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-9)
    theirs_by_name = dict(theirs.named_parameters())
    for name, grad in grads.items():
        wanted = theirs_by_name[f"transformer.{name}"].grad.numpy()
        wanted = wanted.T if ".c_" in name and wanted.ndim == 2 else wanted
        np.testing.assert_allclose(grad, wanted, rtol=1e-8, atol=1e-10, err_msg=name)


def test_the_oracles_adamw_is_torchs():
    torch = pytest.importorskip("torch", reason="needs the extra 'oracle': transformers and torch")
    rng = np.random.default_rng(2)
    start, grads = rng.normal(size=(4, 3)), rng.normal(size=(5, 4, 3))
    ours = {"w": start.copy()}
    optimizer = AdamW(ours, beta2=0.95, weight_decay=0.1, grad_clip=0)
    p = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for g in grads:
        optimizer.step({"w": g}, lr=0.01)
        p.grad = torch.tensor(g)
        theirs.step()
    np.testing.assert_allclose(ours["w"], p.detach().numpy(), rtol=1e-12)
