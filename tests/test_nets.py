"""Networks against PyTorch's own modules, and against numbers by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rlkit.nets import (
    ACTIVATIONS,
    MLP,
    EnsembleLayerNorm,
    EnsembleLinear,
    EnsembleMLP,
    LearnedScalar,
    Linear,
    RunningNorm,
    ToFloat32,
    orthogonal_,
)

CPU = torch.device("cpu")
MODULES = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "gelu": nn.GELU, "silu": nn.SiLU, "leaky_relu": nn.LeakyReLU
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def separate(net: Any, activation: str, norms: bool) -> list[nn.Sequential]:
    """The members of an ensemble as ordinary networks with the same weights."""
    members = []
    for i in range(net.n):
        modules: list[nn.Module] = []
        for k, layer in enumerate(net.layers):
            weight, bias = layer.weight[i].detach().T, layer.bias[i, 0].detach()
            linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
            linear.weight.data.copy_(weight)
            linear.bias.data.copy_(bias)
            modules.append(linear)
            if k < len(net.layers) - 1:
                if norms:
                    norm = nn.LayerNorm(weight.shape[0], dtype=weight.dtype)
                    norm.weight.data.copy_(net.norms[k].weight[i, 0].detach())
                    norm.bias.data.copy_(net.norms[k].bias[i, 0].detach())
                    modules.append(norm)
                modules.append(MODULES[activation]())
        members.append(nn.Sequential(*modules))
    return members


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("norms", [False, True])
def test_ensemble_is_n_separate_networks(activation: str, norms: bool) -> None:
    """Values, gradients of the input and gradients of every weight."""
    net: Any = EnsembleMLP(3, [4, 6, 5, 2], activation, layer_norm=norms).double()
    for parameter in net.parameters():  # scale and shift of the norms, too, so that no two members agree
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    members = separate(net, activation, norms)
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 7, 2, dtype=torch.float64)

    out = net(x)
    (weights * out).sum().backward()
    gradient, x.grad = x.grad, None
    expected = torch.stack([member(x) for member in members])
    (weights * expected).sum().backward()

    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradient, x.grad)
    for i, member in enumerate(members):
        linears = [m for m in member if isinstance(m, nn.Linear)]
        for layer, linear in zip(net.layers, linears, strict=True):
            torch.testing.assert_close(layer.weight.grad[i].T, linear.weight.grad)
            torch.testing.assert_close(layer.bias.grad[i, 0], linear.bias.grad)
        if net.norms is not None:
            for ours, theirs in zip(net.norms, [m for m in member if isinstance(m, nn.LayerNorm)], strict=True):
                torch.testing.assert_close(ours.weight.grad[i, 0], theirs.weight.grad)
                torch.testing.assert_close(ours.bias.grad[i, 0], theirs.bias.grad)


def test_ensemble_takes_one_input_or_one_a_member() -> None:
    net, x = EnsembleMLP(2, [3, 4, 1]), torch.randn(2, 5, 3)
    both = net(x)
    assert both.shape == (2, 5, 1)
    for i in range(2):
        torch.testing.assert_close(both[i], net(x[i])[i])


def test_ensemble_without_hidden_layers_is_linear() -> None:
    net: Any = EnsembleMLP(2, [3, 1], layer_norm=True, dropout=0.5)
    x = torch.randn(5, 3)
    assert net.masks(5, torch.Generator()) == []
    torch.testing.assert_close(net(x), x @ net.layers[0].weight + net.layers[0].bias)


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 300), (100, 30), (256, 256)])
def test_initial_weights_are_those_of_linear(inputs: int, outputs: int) -> None:
    """Uniform on +-1/sqrt(inputs), weights and biases: bounds, and the variance bound^2 / 3."""
    bound = 1 / math.sqrt(inputs)
    ours, theirs = EnsembleLinear(5, inputs, outputs), nn.Linear(inputs, outputs)
    assert theirs.weight.abs().max() <= bound  # what PyTorch does now
    for values in (ours.weight.detach(), ours.bias.detach()):
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.98 * bound
        assert float(values.var()) == pytest.approx(bound**2 / 3, rel=0.15)
        assert abs(float(values.mean())) < 5 * bound / math.sqrt(3 * values.numel())
    assert not torch.equal(ours.weight[0], ours.weight[1])


def test_ensemble_layer_norm_is_layer_norm_a_member() -> None:
    ours, x = EnsembleLayerNorm(3, 8), torch.randn(3, 5, 8) * 3 + 1
    ours.weight.data.normal_()
    ours.bias.data.normal_()
    for i in range(3):
        expected = nn.functional.layer_norm(x[i], (8,), ours.weight[i, 0], ours.bias[i, 0])
        torch.testing.assert_close(ours(x)[i], expected)


@pytest.mark.parametrize("last", [False, True])
def test_mlp_is_a_sequence_of_linears(last: bool) -> None:
    net, x = MLP([3, 5, 4, 2], "tanh", activate_last=last), torch.randn(2, 6, 3)
    a, b, c = net.layers
    expected = c(torch.tanh(b(torch.tanh(a(x)))))
    torch.testing.assert_close(net(x), torch.tanh(expected) if last else expected)


def test_mlp_without_layers_is_the_identity() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(MLP([3], activate_last=True)(x), x)


def test_learned_scalar() -> None:
    scalar = LearnedScalar(-1.5)
    assert scalar().shape == ()
    assert scalar().item() == -1.5
    (gradient,) = torch.autograd.grad(scalar() * 3, [scalar.value])
    assert gradient.item() == 3


# Dropout


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_dropout_keeps_the_mean() -> None:
    """Each element is 0 with probability p, else 1/(1-p): over 10^6 of them the mean is 1 +- 5 sqrt(p/(1-p)) / 1000."""
    for p in (0.01, 0.3, 0.9):
        (mask,) = EnsembleMLP(1, [3, 1000, 1], dropout=p).masks(1000, seeded())
        assert mask.unique().tolist() == [0.0, pytest.approx(1 / (1 - p))]
        assert float(mask.double().mean()) == pytest.approx(1, abs=5e-3 * math.sqrt(p / (1 - p)))


def test_dropout_multiplies_hidden_layers_and_their_gradients() -> None:
    """Without activations that bend, y = w2 (m * w1 x), layer by layer, and the gradient passes through the mask."""
    net: Any = EnsembleMLP(1, [3, 8, 1], "leaky_relu", dropout=0.5)
    x = torch.randn(4, 3)
    (mask,) = masks = net.masks(4, seeded())
    first, second = net.layers
    hidden = nn.functional.leaky_relu((x @ first.weight[0] + first.bias[0]) * mask[0])
    torch.testing.assert_close(net(x, masks)[0], hidden @ second.weight[0] + second.bias[0])
    assert 0 < float((mask == 0).float().mean()) < 1
    (gradient,) = torch.autograd.grad(net(x, masks).sum(), [first.bias])
    slope = torch.where(hidden > 0, 1.0, 0.01)
    torch.testing.assert_close(gradient[0, 0], (mask[0] * slope * second.weight[0, :, 0]).sum(0))


def test_dropout_draws_from_its_generator_alone() -> None:
    net = EnsembleMLP(2, [3, 32, 16, 1], dropout=0.5)
    before = torch.random.get_rng_state()
    first, second = net.masks(4, seeded()), net.masks(4, seeded(6))
    assert torch.equal(before, torch.random.get_rng_state())
    assert [tuple(mask.shape) for mask in first] == [(2, 4, 32), (2, 4, 16)]
    assert not torch.equal(first[0], second[0])
    assert all(map(torch.equal, first, net.masks(4, seeded())))


def test_nothing_is_dropped_without_masks() -> None:
    net, plain = EnsembleMLP(2, [3, 8, 1], dropout=0.5), EnsembleMLP(2, [3, 8, 1])
    plain.load_state_dict(net.state_dict())
    generator, x = seeded(), torch.randn(4, 3)
    state = generator.get_state()
    assert torch.equal(net(x), plain(x))
    assert plain.masks(4, generator) == []
    assert torch.equal(state, generator.get_state())


def test_dropout_of_a_member_is_its_own() -> None:
    """Equal members, equal inputs: different masks, so that an ensemble stays an ensemble."""
    net = EnsembleMLP(2, [3, 64, 1], dropout=0.5)
    for parameter in net.parameters():
        parameter.data[1] = parameter.data[0]
    out = net(torch.randn(4, 3), net.masks(4, seeded()))
    assert not torch.equal(out[0], out[1])


def test_hidden_layer_order_is_dropout_norm_activation() -> None:
    """DroQ's order: whatever is dropped, the layer norm's output (before ReLU) has mean 0 and variance 1 a row."""
    net = EnsembleMLP(2, [3, 64, 64], layer_norm=True, dropout=0.5)
    seen: list[Tensor] = []
    assert net.norms is not None
    net.norms[0].register_forward_hook(lambda _module, inputs, output: seen.extend([inputs[0], output]))
    net(torch.randn(4, 3), net.masks(4, seeded()))
    assert 0.3 < float((seen[0] == 0).float().mean()) < 0.7
    torch.testing.assert_close(seen[1].mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[1].var(-1, unbiased=False), torch.ones(2, 4), atol=1e-3, rtol=0)


# Running normalisation


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.sampled_from([0.0, 1e4]))
def test_running_norm_has_the_moments_of_all_rows(sizes: list[int], offset: float) -> None:
    """Whatever the batches, empty ones included; an offset of 10,000 shows what cancels."""
    rows = np.random.default_rng(0).normal(size=(sum(sizes), 3)) * [1, 5, 0.01] + offset
    norm, start = RunningNorm(3), 0
    for size in sizes:
        norm.update(torch.from_numpy(rows[start : start + size]))
        start += size
    assert float(norm.count) == len(rows)
    if len(rows):
        np.testing.assert_allclose(norm.mean.numpy(), rows.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(norm.var.numpy(), rows.var(0), rtol=1e-6, atol=1e-12)


def test_running_norm_before_any_row_only_clips() -> None:
    x = torch.tensor([[-9.5, 0.0, 3.25], [1e-3, 50.0, -1e9]])
    assert torch.equal(RunningNorm(3)(x), torch.tensor([[-9.5, 0.0, 3.25], [1e-3, 10.0, -10.0]]))


def test_running_norm_by_hand() -> None:
    """Rows 1 and 5: mean 3, variance 4, so 7 is 2 standard deviations above; a clip of 1.5 holds it there."""
    norm = RunningNorm(1)
    norm.update(torch.tensor([[1.0], [5.0]]))
    assert float(norm(torch.tensor([7.0]))) == pytest.approx(2, rel=1e-6)
    assert norm(torch.tensor([7.0], dtype=torch.float64)).dtype == torch.float32
    tight = RunningNorm(1, clip=1.5)
    tight.load_state_dict(norm.state_dict())
    assert float(tight(torch.tensor([7.0]))) == 1.5
    assert float(tight(torch.tensor([-7.0]))) == -1.5


def test_running_norm_is_frozen_in_forward_and_saved_with_the_module() -> None:
    norm = RunningNorm(2)
    norm.update(torch.randn(9, 2))
    before = copy.deepcopy(norm.state_dict())
    norm.train()(torch.randn(50, 2))
    assert before.keys() == {"mean", "var", "count"}
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_running_norm_of_a_constant_is_finite() -> None:
    norm = RunningNorm(1)
    norm.update(torch.full((5, 1), 3.0))
    assert float(norm(torch.tensor([3.0]))) == 0
    assert float(norm(torch.tensor([4.0]))) == 10


def test_to_float32_is_the_identity() -> None:
    module = ToFloat32()
    module.update(torch.full((3, 2), 100.0))
    x = torch.tensor([[1, 200]], dtype=torch.uint8)
    assert torch.equal(module(x), torch.tensor([[1.0, 200.0]]))


def test_orthogonal_weights_of_single_and_batched_layers() -> None:
    """W W^T = gain^2 I over the smaller side, biases 0, and members differ."""
    torch.manual_seed(0)
    batched, single = EnsembleLinear(2, 3, 5), Linear(6, 4)
    for module in (batched, single):
        orthogonal_(module, 1.5)
        assert not module.bias.any()
    for matrix in batched.weight:  # (3, 5)
        torch.testing.assert_close(matrix @ matrix.T, 1.5**2 * torch.eye(3))
    torch.testing.assert_close(single.weight @ single.weight.T, 1.5**2 * torch.eye(4))
    assert not torch.equal(batched.weight[0], batched.weight[1])
