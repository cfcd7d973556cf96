"""Log-probabilities, entropies and their gradients against closed forms, autograd and the model's own logits."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlkit.errors import UserError
from rlkit.lm.logps import (
    Head,
    Tail,
    TokenStats,
    backbone,
    causal_lm,
    check_head,
    completion_logps,
    entropy,
    find_head,
    last_hidden,
    prompt_learning,
    token_logps,
)

V, H = 97, 16
TAILS = {
    "plain": Tail(),
    "cap": Tail(cap=2.0),
    "multiply": Tail(multiply=0.25),
    "divide and cap": Tail(divide=3.0, cap=1.5),
}


def data(n: int = 23, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states (n, H) large enough to bend a cap, and targets (n,)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 2 * torch.randn(n, H, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), torch.randint(V, (n,), generator=generator)


def linear(bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 1) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(H, V, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return module


class Wrapped(nn.Module):
    """A projection that is no plain linear layer."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def by_definition(head: Head, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Softmax written out: p_j = exp z_j / sum exp z, H = -sum p ln p."""
    z = head.module(hidden) * head.tail.multiply / head.tail.divide
    if head.tail.cap is not None:
        z = head.tail.cap * torch.tanh(z / head.tail.cap)
    e = (z / temperature).exp()
    p = e / e.sum(-1, keepdim=True)
    return p[torch.arange(len(p)), targets].log(), -(p * p.log()).sum(-1)


# Closed forms


def test_uniform_logits_have_the_logarithm_of_their_number() -> None:
    logits = torch.full((3, 50), 7.0)
    torch.testing.assert_close(token_logps(logits, torch.tensor([0, 7, 49])), torch.full((3,), -math.log(50)))
    torch.testing.assert_close(entropy(logits), torch.full((3,), math.log(50)))


def test_two_outcomes() -> None:
    """p = sigmoid(ln 3) = 3/4; H = -(3/4) ln(3/4) - (1/4) ln(1/4)."""
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    assert token_logps(logits, torch.tensor([0])).item() == pytest.approx(math.log(0.75), abs=1e-15)
    assert token_logps(logits, torch.tensor([1])).item() == pytest.approx(math.log(0.25), abs=1e-15)
    assert entropy(logits).item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), abs=1e-15)


def test_impossible_tokens_add_nothing_to_the_entropy() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0], [0.0, 0.0, -math.inf]])
    torch.testing.assert_close(entropy(logits), torch.full((2,), math.log(2)))


def test_half_precision_logits_are_summed_in_float32() -> None:
    """10,000 equal logits: a bfloat16 sum of exponentials stops growing at 256, and its logarithm would be 5.5."""
    logits = torch.zeros(1, 10_000, dtype=torch.bfloat16)
    logp = token_logps(logits, torch.tensor([3]))
    assert logp.dtype == torch.float32
    assert logp.item() == pytest.approx(-math.log(10_000), rel=1e-6)
    assert entropy(logits).dtype == torch.float32
    assert token_logps(logits.double(), torch.tensor([3])).dtype == torch.float64


# All ways of computing against the definition: value and gradient, float64


WAYS: dict[str, Callable[[nn.Linear], tuple[nn.Module, int]]] = {
    # projection, budget: one position of V float64 values with two tensors and more takes 16 V bytes and more
    "kept": lambda m: (m, 2**30),
    "recomputed": lambda m: (m, 5 * 4 * V * 8),
    "one position at a time": lambda m: (m, 1),
    "frozen": lambda m: (m.requires_grad_(False), 5 * 4 * V * 8),
    "any head, one block": lambda m: (Wrapped(m), 2**30),
    "any head, blocks": lambda m: (Wrapped(m), 5 * 4 * V * 8),
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_the_definition(way: str, tail: str, with_bias: bool) -> None:
    hidden, targets = data()
    upstream = torch.linspace(-1, 2, len(hidden), dtype=torch.float64)
    for temperature, entropy_weight in itertools.product((1.0, 0.7), (None, 0.0, 0.5)):
        found = []
        for oracle in (True, False):
            module, budget = WAYS[way](linear(with_bias))
            head, x = Head(module, TAILS[tail]), hidden.clone().requires_grad_()
            if oracle:
                stats = TokenStats(*by_definition(head, x, targets, temperature))
            else:
                stats = completion_logps(
                    head, x, targets, temperature=temperature, budget=budget,
                    with_entropy=entropy_weight is not None, entropy_grad=bool(entropy_weight),
                )  # fmt: skip
            loss = (upstream * stats.logp).sum()
            if entropy_weight:
                assert stats.entropy is not None
                loss = loss + entropy_weight * (upstream**2 * stats.entropy).sum()
            loss.backward()
            values = [stats.logp] + ([stats.entropy] if entropy_weight is not None else [])
            found.append([*values, x.grad, *(p.grad for p in module.parameters() if p.requires_grad)])
            if not oracle:
                assert (stats.entropy is None) == (entropy_weight is None)
                if entropy_weight == 0.0:
                    assert stats.entropy is not None
                    assert not stats.entropy.requires_grad
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-11)


def test_gradients_flow_only_where_they_are_asked_for() -> None:
    hidden, targets = data()
    module = linear()
    completion_logps(Head(module), hidden, targets).logp.sum().backward()  # the head alone
    expected = module.weight.grad
    assert expected is not None
    module.zero_grad()
    by_definition(Head(module), hidden, targets, 1.0)[0].sum().backward()
    torch.testing.assert_close(module.weight.grad, expected)
    with torch.no_grad():
        stats = completion_logps(Head(module), hidden.requires_grad_(), targets, with_entropy=True)
    assert not stats.logp.requires_grad
    stats = completion_logps(Head(module), hidden, targets, with_entropy=True, entropy_grad=True)
    assert stats.entropy is not None
    (only_entropy,) = torch.autograd.grad(stats.entropy.sum(), hidden)
    (oracle,) = torch.autograd.grad(by_definition(Head(module), hidden, targets, 1.0)[1].sum(), hidden)
    torch.testing.assert_close(only_entropy, oracle)


@pytest.mark.parametrize("wrap", [False, True])
def test_no_tokens(wrap: bool) -> None:
    hidden, targets = data(0)
    module = linear()
    head = Head(Wrapped(module) if wrap else module)
    stats = completion_logps(head, hidden.requires_grad_(), targets, with_entropy=True)
    assert stats.logp.shape == (0,)
    assert stats.entropy is not None
    assert stats.entropy.shape == (0,)
    stats.logp.sum().backward()
    torch.testing.assert_close(module.weight.grad, torch.zeros_like(module.weight))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("way", WAYS)
def test_a_second_backward_pass_gives_the_same_gradient(way: str, tail: str) -> None:
    """What was kept is not overwritten by the first one."""
    hidden, targets = data()
    module, budget = WAYS[way](linear())
    stats = completion_logps(
        Head(module, TAILS[tail]), hidden.requires_grad_(), targets, with_entropy=True, entropy_grad=True, budget=budget
    )
    assert stats.entropy is not None
    loss = stats.logp.sum() + stats.entropy.sum()
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_a_token_that_cannot_come_changes_nothing(way: str) -> None:
    """A bias of -inf, against the same head without that token."""
    hidden, targets = data()
    hidden.requires_grad_()
    targets = targets % (V - 1)
    full, short = linear(), linear()
    with torch.no_grad():
        full.bias[-1] = -torch.inf
        short.weight, short.bias = nn.Parameter(full.weight[:-1].clone()), nn.Parameter(full.bias[:-1].clone())
    logp, entropies = by_definition(Head(short), hidden, targets, 1.0)
    (expected,) = torch.autograd.grad((logp + 0.5 * entropies).sum(), hidden)
    module, budget = WAYS[way](full)
    stats = completion_logps(Head(module), hidden, targets, with_entropy=True, entropy_grad=True, budget=budget)
    assert stats.entropy is not None
    torch.testing.assert_close(stats.logp, logp)
    torch.testing.assert_close(stats.entropy, entropies)
    torch.testing.assert_close(
        completion_logps(Head(module), hidden, targets, with_entropy=True, budget=budget).entropy, entropies.detach()
    )
    (found,) = torch.autograd.grad((stats.logp + 0.5 * stats.entropy).sum(), hidden)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_has_to_be_positive(temperature: float) -> None:
    with pytest.raises(UserError, match="temperature"):
        completion_logps(Head(linear()), *data(), temperature=temperature)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("budget", [2**30, 5 * 10 * V])
def test_under_autocast_it_is_what_autograd_makes_of_the_same_products(budget: int, frozen: bool) -> None:
    """bfloat16 products, float32 softmax; the gradients differ by bfloat16 rounding of sums (2^-8) at most."""
    hidden, targets = data(dtype=torch.float32)
    results = []
    for oracle in (True, False):
        module, x = linear(dtype=torch.float32).requires_grad_(not frozen), hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            if oracle:
                logp = token_logps(module(x), targets)
            else:
                logp = completion_logps(Head(module), x, targets, budget=budget).logp
        assert logp.dtype == torch.float32
        logp.sum().backward()
        results.append([logp.detach(), x.grad] + ([] if frozen else [module.weight.grad, module.bias.grad]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-6)
    for a, b in zip(*results, strict=True):
        assert a is not None
        assert b is not None
        assert (a - b).norm() <= 2**-7 * a.norm()


# Memory


class Wide(TorchDispatchMode):
    """Follows storages of tensors whose last dimension is V: the largest one, and the most bytes alive at once."""

    def __init__(self, ignore: int) -> None:
        super().__init__()
        self.ignore, self.alive, self.now, self.peak, self.largest = ignore, set[int](), 0, 0, 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm):
            self.products += out.shape[-1] == V  # logits
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (V,) and tensor.dim() == 2:
                storage = tensor.untyped_storage()
                if tensor.shape[0] == self.ignore or storage.data_ptr() in self.alive:
                    continue  # the weight or its gradient; a view or an in-place result
                key, size = storage.data_ptr(), storage.nbytes()
                self.alive.add(key)
                self.now += size
                weakref.finalize(storage, self.freed, key, size)
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        return out

    def freed(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


@pytest.mark.parametrize("way", ["trained", "frozen", "any head", "no gradient"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tail", ["plain", "cap"])
def test_no_more_than_the_budget_is_alive(way: str, autocast: bool, tail: str) -> None:
    """200 positions of 97 entries take 78 kB a tensor; 20 kB are allowed."""
    budget = 20_000
    hidden, targets = data(200, torch.float32)
    module = linear(dtype=torch.float32).requires_grad_(way != "frozen")
    head = Head(Wrapped(module) if way == "any head" else module, TAILS[tail])
    hidden.requires_grad_()
    with Wide(ignore=H) as seen:
        with torch.set_grad_enabled(way != "no gradient"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            stats = completion_logps(head, hidden, targets, with_entropy=True, budget=budget)
        forward = seen.peak
        if way != "no gradient":
            stats.logp.sum().backward()
    assert budget / 8 < seen.largest <= budget  # blocks are not smaller than they need to be
    assert forward <= seen.peak <= budget
    full = Wide(ignore=H)
    with full:  # the counter sees the full tensor where there is one
        torch.log_softmax(module(hidden.detach()), -1)
    assert full.largest == 200 * V * 4


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_keeping_everything_stays_within_the_budget_too(autocast: bool, with_entropy: bool) -> None:
    """Kept log-probabilities and their gradient, 8 bytes a logit, besides 2 for the cast and 4 for the entropy's."""
    hidden, targets = data(40, torch.float32)
    module = linear(dtype=torch.float32)
    needed = 40 * V * (8 + 2 * autocast + 4 * with_entropy)
    peaks, products = [], []
    for budget in (needed, needed - 1):
        with Wide(ignore=H) as seen:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                stats = completion_logps(
                    Head(module), hidden, targets, with_entropy=with_entropy, entropy_grad=True, budget=budget
                )
            loss = stats.logp.sum() + (stats.entropy.sum() if stats.entropy is not None else 0.0)
            loss.backward()
        peaks.append(seen.peak)
        products.append(seen.products)
    assert needed * 0.6 < peaks[0] <= needed
    assert peaks[1] <= needed - 1
    assert products == [1, 4]  # kept: one; two blocks, each computed going forth and back


# Models


def tiny(name: str, **fields: Any) -> Any:
    import transformers as t

    common = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = {**common, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
    configs: dict[str, Any] = {
        "llama": lambda: t.LlamaConfig(**llama),
        "tied": lambda: t.LlamaConfig(**llama, tie_word_embeddings=True),
        "gemma2": lambda: t.Gemma2Config(**llama, final_logit_softcapping=0.05, attn_implementation="eager"),
        "gemma3": lambda: t.Gemma3TextConfig(**llama, final_logit_softcapping=0.05),
        "cohere": lambda: t.CohereConfig(**llama, logit_scale=0.3),
        "cohere2": lambda: t.Cohere2Config(**llama, logit_scale=0.3),
        "granite": lambda: t.GraniteConfig(**llama, logits_scaling=7.0),
        "hyperclovax": lambda: t.HyperCLOVAXConfig(**llama, logits_scaling=7.0),
        "nanochat": lambda: t.NanoChatConfig(**llama, final_logit_softcapping=0.05),
        "gpt2": lambda: t.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4),
        "neox": lambda: t.GPTNeoXConfig(**common, intermediate_size=48),
        "phi": lambda: t.PhiConfig(**common, intermediate_size=48),  # the head has a bias
        "opt": lambda: t.OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=16),
    }
    config = configs[name]()
    for key, value in fields.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(config).eval()


NAMES = [
    "llama", "tied", "gemma2", "gemma3", "cohere", "cohere2", "granite", "hyperclovax", "nanochat", "gpt2", "neox",
    "phi", "opt",
]  # fmt: skip
IDS = torch.arange(2 * 9).view(2, 9) * 5 % V


@pytest.mark.parametrize("name", NAMES)
def test_the_head_on_the_backbone_gives_the_models_logits(name: str) -> None:
    model = tiny(name).train()
    with torch.no_grad():
        for parameter in model.parameters():  # so that caps and biases matter
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    assert check_head(model, IDS) <= 1e-6
    assert find_head(model, IDS) is not None
    assert model.training  # left as it was


def test_what_follows_the_projection_is_noticed_when_it_is_missing() -> None:
    for name in ("gemma2", "cohere", "granite", "hyperclovax"):
        model = tiny(name)
        head = Head.of(model)
        assert head.tail != Tail()
        base = backbone(model)
        assert base is not None
        with torch.no_grad():
            hidden = last_hidden(base, {"input_ids": IDS}).flatten(0, 1)
            own = model(input_ids=IDS).logits.flatten(0, 1)
            torch.testing.assert_close(head(hidden), own)
            assert (Head(head.module)(hidden) - own).abs().max() > 1e-3


def test_a_model_that_does_more_to_its_logits_uses_its_own() -> None:
    """Here a hook after the whole model shifts one logit; nothing in the configuration tells."""
    model = tiny("llama")

    def shift(module: nn.Module, args: Any, out: Any) -> Any:
        out.logits = out.logits + torch.eye(V)[3]
        return out

    model.register_forward_hook(shift)
    assert check_head(model, IDS) == pytest.approx(1.0, abs=1e-5)
    assert find_head(model, IDS) is None


def test_adapters_count_in_the_backbone_and_on_the_head() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        tiny("llama"), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    assert type(causal_lm(model)).__name__ == "LlamaForCausalLM"
    assert Head.of(model).linear is None  # called as a module
    assert check_head(model, IDS) <= 1e-6
    with model.disable_adapter():
        plain = model(input_ids=IDS).logits
        assert check_head(model, IDS) <= 1e-6
    base = backbone(model)
    assert base is not None
    with torch.no_grad():
        ours = Head.of(model)(last_hidden(base, {"input_ids": IDS}))
    assert (ours - plain).abs().max() > 1e-2
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for budget in (2**30, 2 * 4 * V * 4):
        model.zero_grad()
        completion_logps(Head.of(model), hidden, IDS[0, :6], budget=budget).logp.sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all("lm_head.lora" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_virtual_tokens_need_the_models_own_call() -> None:
    from peft import PromptTuningConfig, get_peft_model

    model: Any = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert prompt_learning(model)
    assert backbone(model) is None
    assert find_head(model, IDS) is None
    assert not prompt_learning(tiny("llama"))


def test_hooks_and_replaced_methods_are_called() -> None:
    module = linear()
    assert Head(module).linear is module
    handle = module.register_forward_hook(lambda *_: None)
    assert Head(module).linear is None
    handle.remove()
    assert Head(module).linear is module
    module.forward = lambda x: x  # type: ignore[method-assign]
    assert Head(module).linear is None


def test_a_model_without_a_vocabulary_says_so() -> None:
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(UserError, match="LlamaModel has no output projection"):
        Head.of(t.LlamaModel(config))
