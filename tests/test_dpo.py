"""DPO's losses against closed forms; parity with TRL is in test_parity_trl.py."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from lm_zoo import PAIRS, saved_llama, tiny_llama
from torch.nn import functional as F

import rlkit
from rlkit.errors import UserError
from rlkit.trainers.dpo import DPO, LossType, pair_loss

LOSSES = ["sigmoid", "hinge", "ipo", "ipo_sum", "robust", "exo_pair", "nca_pair", "sppo_hard", "sigmoid_norm"]


def smoothing(loss: str) -> float:
    return 0.1 if loss in ("robust", "exo_pair") else 0.0


def test_tabular_optimum_is_the_reference_tilted_by_the_reward() -> None:
    """All ordered pairs with labels s(r_i - r_j): the minimiser is pi_ref exp(r / beta) / Z (Eq. 4).

    For these numbers exp(r / beta) = [e^2, e, 1, e^-1, e^-2]; times pi_ref and normalised: [.4175, .3072, .2260, .0416,
    .0076], with expected reward 0.5427 and KL 0.5146.
    """
    reward = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0], dtype=torch.float64)
    reference, beta = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1], dtype=torch.float64), 0.5
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)
    i, j = torch.triu_indices(5, 5, 1)
    prefers = torch.sigmoid(reward[i] - reward[j])

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        h = F.log_softmax(logits, 0) - reference.log()
        value = (prefers * pair_loss(h[i], h[j], beta) + (1 - prefers) * pair_loss(h[j], h[i], beta)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    policy = torch.softmax(logits, 0).detach()
    torch.testing.assert_close(
        policy, torch.tensor([0.4175, 0.3072, 0.2260, 0.0416, 0.0076], dtype=torch.float64), atol=5e-5, rtol=0
    )
    assert float((policy * reward).sum()) == pytest.approx(0.5427, abs=1e-4)
    assert float((policy * (policy / reference).log()).sum()) == pytest.approx(0.5146, abs=1e-4)


def test_gradient() -> None:
    """dL / dh_w = -beta s(-beta D) for each pair (section 4, the gradient's analysis)."""
    h = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pair_loss(h[0], h[1], 0.3).mean().backward()
    assert h.grad is not None
    expected = 0.3 * torch.sigmoid(-0.3 * (h[0] - h[1])).detach() / 7
    torch.testing.assert_close(h.grad[0], -expected)
    torch.testing.assert_close(h.grad[1], expected)


def test_at_the_reference_the_loss_is_log_2() -> None:
    zero = torch.zeros(3)
    assert pair_loss(zero, zero).tolist() == pytest.approx([math.log(2)] * 3)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo_sum", "robust"])
def test_a_constant_on_both_sides_changes_nothing(loss: str) -> None:
    h = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        pair_loss(h[0] + 5, h[1] + 5, 0.2, loss, smoothing(loss)), pair_loss(h[0], h[1], 0.2, loss, smoothing(loss))
    )


def test_conservative_dpo_has_a_finite_margin() -> None:
    """With a label wrong with probability e, the minimiser has s(beta D) = 1 - e: beta D = log 9 at e = 0.1."""
    margin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([margin], max_iter=100, tolerance_grad=1e-12)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = pair_loss(margin, torch.zeros_like(margin), 0.5, "sigmoid", 0.1).sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert 0.5 * float(margin.detach()) == pytest.approx(math.log(9), abs=1e-6)


def test_robust_loss_is_unbiased_under_flips() -> None:
    """(1-e) L(x) + e L(-x), with L the robust loss, is the plain loss of x: the point of arXiv:2403.00409."""
    h, zero = torch.linspace(-3, 3, 13, dtype=torch.float64), torch.zeros(13, dtype=torch.float64)
    noisy = 0.8 * pair_loss(h, zero, 1.0, "robust", 0.2) + 0.2 * pair_loss(zero, h, 1.0, "robust", 0.2)
    torch.testing.assert_close(noisy, pair_loss(h, zero, 1.0))


def test_numbers_of_the_other_losses() -> None:
    """h_w = 1, h_l = -1, beta = 0.5, so D = 2 and beta D = 1; lengths 2 and 4; worked by hand."""
    one = torch.tensor([1.0], dtype=torch.float64)
    lengths = torch.tensor([2]), torch.tensor([4])
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    expected = {
        "hinge": 0.0,
        "ipo": (0.5 + 0.25 - 1.0) ** 2,
        "ipo_sum": (2.0 - 1.0) ** 2,
        "nca_pair": softplus(-0.5) + 0.5 * softplus(0.5) + 0.5 * softplus(-0.5),
        "sppo_hard": 0.0,
        "sigmoid_norm": softplus(-0.5 * 0.75),
    }
    for loss, value in expected.items():
        assert pair_loss(one, -one, 0.5, loss, 0.0, *lengths).item() == pytest.approx(value), loss
    p = 1 / (1 + math.exp(-1))
    kl = p * math.log(p / 0.9) + (1 - p) * math.log((1 - p) / 0.1)
    assert pair_loss(one, -one, 0.5, "exo_pair", 0.1).item() == pytest.approx(kl)


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_ratios_stay_finite(loss: str) -> None:
    far = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    value = pair_loss(far, -far.detach(), 1.0, loss, smoothing(loss), torch.ones(3), torch.ones(3)).sum()
    value.backward()
    assert far.grad is not None
    assert math.isfinite(float(value.detach()))
    assert torch.isfinite(far.grad).all()


def test_weights_of_pairs_scale_their_losses() -> None:
    """A pair of weight 0 leaves no gradient: the run equals one whose rows lack it, but for the count in the mean."""
    options: dict[str, Any] = {
        "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "eval_fraction": 0, "device": "cpu",
        "per_device_train_batch_size": 6,
    }  # fmt: skip
    weights = []
    for rows, rate in (
        ([{**row, "weight": float(i < 3)} for i, row in enumerate(PAIRS)], 0.1),
        (PAIRS[:3], 0.05),  # the mean over 3 instead of 6 pairs doubles the gradient
    ):
        model, tokenizer = tiny_llama()
        trainer: Any = rlkit.DPO(
            model, train_dataset=rows, processing_class=tokenizer, learning_rate=rate, beta=0.5, **options
        )
        trainer.learn(2)
        weights.append([p.detach() for p in trainer.model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


# A step of eight pairs in other ways. The reference is another model, so that no log-ratio is 0; weights, lengths and
# prompts (two occur twice) differ, so that a mean over the wrong number or a pair in the wrong place shows.

EIGHT = [
    {**row, "weight": weight}
    for row, weight in zip(
        [
            *PAIRS,
            {"prompt": PAIRS[0]["prompt"], "chosen": " Green.", "rejected": " Three."},
            {"prompt": PAIRS[3]["prompt"], "chosen": " Hi, how do you do?", "rejected": " Oi. Oi. Oi. Oi. Oi."},
        ],
        [1, 0.5, 2, 1, 0.25, 1, 1.5, 1],
        strict=True,
    )
]
SMALL = {"logits_memory": 1e-3}  # MiB: one position's logits at a time
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "4x2": (4, {}),
    "1x8": (1, {}),
    "small": (8, SMALL),
    "packed": (8, {"batching": "packed", "packing_length": 96}),
    "4x2 shared, small": (4, {"batching": "shared", **SMALL}),
    "1x8 packed, small": (1, {"batching": "packed", **SMALL}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two models, policy and reference."""
    place = tmp_path_factory.mktemp("models")
    return saved_llama(place / "policy"), saved_llama(place / "reference", seed=1)


@pytest.mark.parametrize("loss", get_args(LossType))
def test_how_a_step_is_computed_changes_nothing(loss: str, folders: tuple[str, str]) -> None:
    """8 x 1 = 4 x 2 = 1 x 8, packed = shared = plain, few logits at once = all: metrics, and every weight's gradient.

    In float32 to 1e-5 of the largest entry of each weight's gradient, and to 1e-5 relative in the metrics; rounding
    was seen to make up to 2e-6.
    """

    def step(size: int, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        trainer: Any = rlkit.DPO(
            folders[0], ref_model=folders[1], train_dataset=EIGHT, loss_type=(loss,), beta=0.3, eval_fraction=0,
            label_smoothing=smoothing(loss), optim="sgd", learning_rate=0.0, max_grad_norm=0, log_every=1, device="cpu",
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, reference_cache=False,
            **{"batching": "plain", **options},
        )  # fmt: skip
        assert trainer.learn(1).batching == options.get("batching", "plain")
        record = {k: v for k, v in trainer.log.history[0].items() if not k.startswith("time/")}
        return {name: p.grad for name, p in trainer.model.named_parameters()}, record

    gradients, record = step(8)
    assert all(float(gradient.abs().max()) > 1e-4 for gradient in gradients.values())
    for name, (size, options) in WAYS.items():
        others, other = step(size, **options)
        assert other == pytest.approx(record, rel=1e-5, abs=1e-6), name
        for key, gradient in gradients.items():
            difference = float((others[key] - gradient).abs().max() / gradient.abs().max())
            assert difference < 1e-5, f"{name}: {key}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0,)}, "`loss_weights`: got 1, but `loss_type` names 2"),
        ({"loss_type": ("hinge", "hinge")}, "`loss_type`: got hinge, hinge; name each loss once"),
        ({"loss_type": ("hinge",), "label_smoothing": 0.1}, "`label_smoothing`: hinge has none"),
        ({"loss_type": ("exo_pair",)}, "`label_smoothing`: exo_pair needs more than 0"),
        ({"label_smoothing": 0.5}, "`label_smoothing`: got 0.5; allowed: a number >= 0 and < 0.5"),
        ({"beta": -1}, "`beta`: got -1; allowed: a number > 0"),
        ({"loss_type": ("sigmod",)}, "`loss_type`"),
    ],
)
def test_options_that_conflict(fields: dict[str, Any], message: str) -> None:
    model, tokenizer = tiny_llama()
    with pytest.raises(UserError) as caught:
        DPO(model, train_dataset=PAIRS, processing_class=tokenizer, **fields)
    assert message in str(caught.value)
