"""Steps against PyTorch's own optimiser, and against numbers by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlkit import checkpoint
from rlkit.nets import MLP
from rlkit.optim import Adam, descend, polyak_


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_polyak_by_hand() -> None:
    """target 1, source 5, tau 0.25: 1 + 0.25 (5 - 1) = 2; tau 0 and 1 are nothing and a copy."""
    source, target = nn.Linear(2, 1), nn.Linear(2, 1).requires_grad_(False)
    for tau, expected in ((0.25, 2.0), (0.0, 1.0), (1.0, 5.0)):
        for module, value in ((source, 5.0), (target, 1.0)):
            for parameter in module.parameters():
                parameter.data.fill_(value)
        polyak_(target, source, tau)
        assert all((p == expected).all() for p in target.parameters())
        assert all((p == 5).all() for p in source.parameters())
    assert all(p.grad is None and not p.requires_grad for p in target.parameters())


def loss_of(net: nn.Module, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 3, generator=generator), torch.randn(8, 1, generator=generator)
    return ((net(x) - y) ** 2).mean() * scale


def state(net: nn.Module, optimizer: Adam) -> list[Tensor]:
    """Every number that a step may change, cloned."""
    saved = optimizer.state_dict()
    moments = [*saved["exp_avg"].values(), *saved["exp_avg_sq"].values()]
    return [value.detach().clone() for value in (*net.parameters(), *moments, saved["step"], saved["powers"])]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_descend_is_a_step_of_adam() -> None:
    ours = MLP([3, 8, 1], "tanh")
    theirs: Any = copy.deepcopy(ours)
    optimizer, plain = Adam(ours.parameters(), 1e-2), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for seed in range(20):
        norm = descend(optimizer, loss_of(ours, seed))
        plain.zero_grad()
        loss_of(theirs, seed).backward()
        expected = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in theirs.parameters()]))
        plain.step()
        assert float(norm) == pytest.approx(float(expected), rel=1e-4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_gradients_are_cut_as_pytorch_does(max_norm: float) -> None:
    ours = MLP([3, 8, 1])
    theirs = copy.deepcopy(ours)
    optimizer, peer = Adam(ours.parameters(), 0.01, eps=1e-5), torch.optim.Adam(theirs.parameters(), 0.01, eps=1e-5)
    for seed in range(5):
        norm = descend(optimizer, loss_of(ours, seed), max_norm=max_norm)
        peer.zero_grad()
        loss_of(theirs, seed).backward()
        whole = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        peer.step()
        torch.testing.assert_close(norm, whole)
        assert float(whole) > 0.05
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_may_be_left_out() -> None:
    net, plain = MLP([3, 8, 1]), MLP([3, 8, 1])
    plain.load_state_dict(net.state_dict())
    optimizer, peer = Adam(net.parameters(), 0.01), Adam(plain.parameters(), 0.01)
    for seed, skip in enumerate((False, True, False)):
        norm = descend(optimizer, loss_of(net, seed), skip=torch.tensor(skip))
        assert norm > 0
        if not skip:
            descend(peer, loss_of(plain, seed))
    assert float(optimizer.step) == 2
    assert all(map(torch.equal, net.parameters(), plain.parameters()))


def test_descend_leaves_other_gradients_alone() -> None:
    """An actor's loss runs through the critic: the critic gets no gradient, and keeps the one that it had."""
    actor, critic = nn.Linear(3, 2), nn.Linear(2, 1)
    held = torch.full_like(critic.weight, 7.0)
    critic.weight.grad = held.clone()
    before = [p.detach().clone() for p in critic.parameters()]
    norm = descend(Adam(actor.parameters(), 1e-2), critic(actor(torch.randn(4, 3))).mean())
    assert float(norm) > 0
    assert torch.equal(critic.weight.grad, held)
    assert critic.bias.grad is None
    assert same(before, list(critic.parameters()))


def test_descend_ignores_a_gradient_that_was_there() -> None:
    a = nn.Linear(3, 1)
    b = copy.deepcopy(a)
    a.weight.grad = torch.full_like(a.weight, 1e6)
    descend(Adam(a.parameters(), 1e-2), loss_of(a, 0))
    descend(Adam(b.parameters(), 1e-2), loss_of(b, 0))
    assert same(list(a.parameters()), list(b.parameters()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("good_steps", [0, 3])
def test_descend_takes_no_step_on_a_non_finite_gradient(bad: float, good_steps: int) -> None:
    """Weights, moments and step counts stay bit for bit; what follows is as if the bad loss had never been."""
    net = MLP([3, 8, 1], "tanh")
    twin = copy.deepcopy(net)
    optimizer, other = Adam(net.parameters(), 1e-2), Adam(twin.parameters(), 1e-2)
    for seed in range(good_steps):
        descend(optimizer, loss_of(net, seed))
        descend(other, loss_of(twin, seed))
    before = state(net, optimizer)
    norm = descend(optimizer, loss_of(net, 99, scale=bad))
    assert not math.isfinite(float(norm))
    assert same(before, state(net, optimizer))
    for seed in range(good_steps, good_steps + 3):
        assert math.isfinite(float(descend(optimizer, loss_of(net, seed))))
        descend(other, loss_of(twin, seed))
    assert same(state(net, optimizer), state(twin, other))
    assert not same(before, state(net, optimizer))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_non_finite_element_is_enough(bad: float) -> None:
    """The gradient of sum(c w) is c; with an infinite element its norm is infinity, which is no NaN."""
    net = nn.Linear(3, 1)
    before = [p.detach().clone() for p in net.parameters()]
    norm = descend(Adam(net.parameters(), 1e-2), (net.weight * torch.tensor([1.0, bad, 1.0])).sum() + net.bias.sum())
    assert norm.isnan() if math.isnan(bad) else norm == math.inf
    assert same(before, list(net.parameters()))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_the_arithmetic_that_is_compiled_is_the_fused_kernel_s(
    betas: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kinds of step in turn, as where a run goes on compiled: weights and moments agree up to rounding, and the
    powers of the betas, on which an exact resumption rests, to the last bit.
    """
    kernel = MLP([3, 8, 1], "tanh")
    both: Any = copy.deepcopy(kernel)
    one, other = Adam(kernel.parameters(), 1e-2, betas), Adam(both.parameters(), 1e-2, betas)
    for seed in range(30):
        descend(one, loss_of(kernel, seed))
        loss = loss_of(both, seed, scale=math.nan if seed == 17 else 1.0)
        with monkeypatch.context() as traced:
            traced.setattr(torch.compiler, "is_compiling", lambda seed=seed: seed % 3 > 0)
            if seed % 3 == 1:
                other.correct_bias()
            descend(other, loss)
            if seed == 17:
                assert float(other.step) == 17
                descend(other, loss_of(both, seed))
    assert torch.equal(one.state_dict()["powers"], other.state_dict()["powers"])
    assert float(one.state_dict()["powers"][1]) == pytest.approx(betas[1] ** 31, rel=1e-12)
    for a, b in zip(state(kernel, one), state(both, other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_gradient_may_lie_otherwise_in_memory() -> None:
    """The gradient of x @ w.T by w comes transposed where a product of one's own computes it."""
    a, b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.empty(4, 4))
    b.data.copy_(a.data)
    grad, finite = torch.randn(4, 4), torch.tensor(True)
    Adam([a], 0.1).take_step([grad], finite)
    Adam([b], 0.1).take_step([grad.t().contiguous().t()], finite)
    assert torch.equal(a, b)


def test_the_learning_rate_may_change_and_is_not_part_of_the_state() -> None:
    net = nn.Linear(3, 1)
    twin = copy.deepcopy(net)
    optimizer, other = Adam(net.parameters(), 1.0), Adam(twin.parameters(), 1e-2)
    optimizer.learning_rate = 1e-2
    descend(optimizer, loss_of(net, 0))
    descend(other, loss_of(twin, 0))
    assert same(state(net, optimizer), state(twin, other))
    third = Adam(twin.parameters(), 0.5)
    third.load_state_dict(other.state_dict())
    assert third.learning_rate == 0.5


def test_its_state_is_exact_and_of_its_parameters_alone(tmp_path: Any) -> None:
    net = MLP([3, 8, 1], "tanh")
    optimizer = Adam(net.parameters(), 1e-2)
    for seed in range(4):
        descend(optimizer, loss_of(net, seed))
    checkpoint.save(tmp_path / "it", {"optimizer": {"one": optimizer.state_dict()}}, about={})
    saved = checkpoint.load(tmp_path / "it", {"optimizer"})[0]["optimizer"]["one"]
    twin = copy.deepcopy(net)
    other = Adam(twin.parameters(), 1e-2)
    other.load_state_dict(saved)
    for seed in range(4, 8):
        descend(optimizer, loss_of(net, seed))
        descend(other, loss_of(twin, seed))
    assert same(state(net, optimizer), state(twin, other))
    with pytest.raises(ValueError, match="parameters of the shapes"):
        Adam(MLP([3, 9, 1]).parameters(), 1e-2).load_state_dict(saved)
