"""Matrix products through oneDNN: the numbers of float64, forwards and backwards, and where they are taken."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_zoo import PAIRS, tiny_llama
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import rlkit
from rlkit import checkpoint, products
from rlkit.errors import UserError
from rlkit.products import library, onednn_products, preferred

pytestmark = pytest.mark.usefixtures("every_size")
CPU = torch.device("cpu")


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products, too."""
    monkeypatch.setattr(products, "SMALLEST", 1)


def calls(function: Callable[[], Any]) -> dict[str, int]:
    """How often each library multiplied matrices."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        function()
    counts = {"mkldnn::_linear_pointwise": 0, "aten::mm": 0, "aten::addmm": 0}
    for event in found.key_averages():
        if event.key in counts:
            counts[event.key] += event.count
    return {"onednn": counts["mkldnn::_linear_pointwise"], "blas": counts["aten::mm"] + counts["aten::addmm"]}


def cases() -> Iterator[Any]:
    """A product, and tensors for it; the last axis of each left side is summed over."""
    shapes = {"x": (3, 7, 5), "m": (21, 5), "t": (5, 21), "w": (4, 5), "b": (4,), "k": (5, 4), "wide": (5, 40)}
    yield pytest.param(lambda x, w, b: F.linear(x, w, b), [shapes[n] for n in "xwb"], id="linear with a bias")
    yield pytest.param(lambda x, w: F.linear(x, w), [shapes[n] for n in "xw"], id="linear")
    yield pytest.param(lambda x, k: x @ k, [shapes[n] for n in "xk"], id="matmul")
    yield pytest.param(torch.matmul, [shapes[n] for n in "mk"], id="torch.matmul")
    yield pytest.param(lambda m, k: m.mm(k), [shapes[n] for n in "mk"], id="mm")
    yield pytest.param(lambda t, k: t.t() @ k, [shapes[n] for n in "tk"], id="left side transposed, longer")
    yield pytest.param(lambda t, w: t.t() @ w, [shapes["t"], shapes["wide"]], id="left side transposed, shorter")
    yield pytest.param(torch.addmm, [shapes[n] for n in "bmk"], id="addmm")


@pytest.mark.parametrize(("function", "shapes"), cases())
def test_products_and_both_derivatives_are_those_of_float64(
    function: Callable[..., Tensor], shapes: list[tuple[int, ...]]
) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def derivatives(inputs: list[Tensor]) -> list[Tensor]:
        inputs = [x.requires_grad_() for x in inputs]
        out = function(*inputs)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        first = torch.autograd.grad((out * weights).sum() + out.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [out, *first, *second]

    expected = derivatives([x.clone() for x in exact])
    found: list[Tensor] = []

    def run() -> None:
        with onednn_products():
            found.extend(derivatives([x.float() for x in exact]))

    counted = calls(run)
    assert counted["onednn"] >= 6  # forward, two by each side, and their own derivatives
    assert not counted["blas"]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))


def test_they_are_repeated_bit_for_bit_wherever_tensors_lie() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(130, 96, generator=generator), torch.randn(70, 96, generator=generator)
    with onednn_products():
        expected = F.linear(x, w)
        for offset in range(1, 9):
            moved = torch.empty(130 * 96 + offset)[offset:].view(130, 96).copy_(x)
            assert F.linear(moved, w).equal(expected)


def test_only_within_and_only_what_is_float32() -> None:
    x, w = torch.randn(8, 6), torch.randn(4, 6)
    assert calls(lambda: F.linear(x, w))["onednn"] == 0

    def other_kinds() -> None:
        with onednn_products():
            F.linear(x.double(), w.double())
            F.linear(x.bfloat16(), w.bfloat16())
            F.linear(x[0], w)
            (x[None] @ w.t()[None]).sum()  # a batch of right sides
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert F.linear(x, w).dtype == torch.bfloat16

    with_onednn = calls(other_kinds)
    assert with_onednn["onednn"] == 0
    assert with_onednn["blas"] >= 2


def test_small_products_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALLEST", 8 * 6 * 4 + 1)
    x, w = torch.randn(8, 6), torch.randn(4, 6)

    def run() -> None:
        with onednn_products():
            F.linear(x, w)
            F.linear(torch.cat([x, x]), w)

    assert calls(run) == {"onednn": 1, "blas": 1}


def test_contexts_nest_and_belong_to_a_thread() -> None:
    x, w = torch.randn(8, 6), torch.randn(4, 6)
    elsewhere: list[int] = []

    def run() -> None:
        with onednn_products():
            with onednn_products():
                F.linear(x, w)
            F.linear(x, w)

    assert calls(run)["onednn"] == 2
    with onednn_products():
        thread = threading.Thread(
            target=lambda: elsewhere.append(len(torch.overrides._get_current_function_mode_stack()))
        )
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            F.linear(x, torch.randn(4, 5))  # the usual error of a wrong shape
    assert elsewhere == [0]
    assert calls(lambda: F.linear(x, w))["onednn"] == 0


def test_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library("auto", CPU) == preferred()
    assert library("auto", torch.device("cuda")) == "blas"
    assert (library("blas", CPU), library("onednn", CPU)) == ("blas", "onednn")
    with pytest.raises(UserError, match="`matmul`: onednn needs a CPU"):
        library("onednn", torch.device("cuda"))
    for capability, description, expected in (
        ("AVX2", "vendor_id: AuthenticAMD", "blas"),
        ("AVX512", "vendor_id: GenuineIntel", "blas"),
        ("AVX512", "vendor_id: AuthenticAMD", "onednn"),
    ):
        preferred.cache_clear()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(products.Path, "exists", lambda path: False)
        monkeypatch.setattr(products.platform, "processor", lambda description=description: description)
        assert preferred() == expected
    monkeypatch.undo()
    preferred.cache_clear()


def trained(matmul: str, **options: Any) -> tuple[Any, list[float], dict[str, int]]:
    """A trainer after four updates, their losses, and which library multiplied in them."""
    model, tokenizer = tiny_llama()
    losses: list[float] = []
    counts = {"onednn": 0, "blas": 0}
    dpo = rlkit.DPO(
        model, train_dataset=PAIRS * 2, processing_class=tokenizer, per_device_train_batch_size=3,
        learning_rate=1e-3, eval_fraction=0, reference_cache=False, device="cpu", matmul=matmul, **options,
    )  # fmt: skip
    update = dpo.update

    def watched(batch: Any) -> Any:
        metrics: dict[str, Tensor] = {}
        for by, count in calls(lambda: metrics.update(update(batch))).items():
            counts[by] += count
        losses.append(float(metrics["loss"]))
        return metrics

    dpo.update = watched
    return dpo.learn(4), losses, counts


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"use_peft": True}], ids=str)
def test_a_trainer_takes_them_for_everything(options: dict[str, Any], tmp_path: Path) -> None:
    dpo, losses, counts = trained("onednn", **options)
    assert counts["onednn"] >= 4 * 40
    assert counts["blas"] == 0
    _, expected, counts = trained("blas", **options)
    assert counts["onednn"] == 0
    assert losses == pytest.approx(expected, rel=1e-4)
    again, repeated, _ = trained("onednn", **options)
    assert repeated == losses
    hashes = {checkpoint.content_hash(t.save(tmp_path / str(i))) for i, t in enumerate((dpo, again))}
    assert len(hashes) == 1
