"""Checkpoints: exact round trips, equal bytes, every kind of damage, kills at every step of a save, hostile folders."""

from __future__ import annotations

import json
import math
import os
import pickle  # noqa: TID251 (to prove that it is never used, and to write the file that must be refused)
import shutil
import signal
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from rlkit import checkpoint
from rlkit.errors import CheckpointError, UserError

TORCH_DTYPES = [*checkpoint._CODES, torch.complex128]


def same(a: Any, b: Any) -> bool:
    """Equal types, order and bits, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(p, q) and same(v, w) for (p, v), (q, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, (np.ndarray, np.generic)):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    return bool(a == b)


def tensor_of_bytes(drawn: tuple[torch.dtype, list[int], bytes]) -> torch.Tensor:
    dtype, shape, seed = drawn
    size = math.prod(shape) * dtype.itemsize
    raw = torch.frombuffer(bytearray((seed * (size // len(seed) + 1))[:size] or b"0"), dtype=torch.uint8)[:size]
    return (raw % 2).bool().reshape(shape) if dtype is torch.bool else raw.view(dtype).reshape(shape)


shapes = st.lists(st.integers(0, 3), max_size=3)
tensors = st.tuples(st.sampled_from(TORCH_DTYPES), shapes, st.binary(min_size=1, max_size=40)).map(tensor_of_bytes)
numpy_types = st.one_of(
    hnp.scalar_dtypes().filter(lambda t: t.kind in "biufcmM"), hnp.unicode_string_dtypes(min_len=1, max_len=4)
)
texts = st.one_of(
    st.text(max_size=6), st.text(st.characters(), max_size=4), st.sampled_from(["$tensor", "\ud800\udc00"])
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**200), 2**200),
    st.floats(),
    texts,
    tensors,
    hnp.arrays(numpy_types, hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3)),
    hnp.from_dtype(np.dtype(np.float32)),
    hnp.from_dtype(np.dtype(np.int64)),
    hnp.from_dtype(np.dtype(np.bool_)),
)
keys = st.one_of(texts, st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), texts))
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(state=states)
def test_any_state_comes_back_bit_for_bit(state: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("c") / "saved"
    checkpoint.save(folder, {"part": state}, about={})
    parts, _ = checkpoint.load(folder)
    assert same(parts, {"part": state})


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        -math.nan,
        struct.unpack(">d", bytes.fromhex("7ff80000000000ab"))[0],  # a NaN with a payload
        math.inf,
        -0.0,
        5e-324,
        2**64 - 1,
        -(2**127),
        10**5000,
        np.float32(math.nan),
        np.str_(""),
        np.array(math.nan),
        np.zeros((0, 3), np.uint16),
        np.array(["é", ""]),
        np.array([1, 2], dtype=">i4"),
        np.array(["2020-01-01"], dtype="M8[D]"),
        {0: {"a": 1}, "0": 2, (1, "x"): 3, None: 4, True: 5, "$tensor": 6},
        {"\ud800": "\udfff", "": ""},
        [(), [], {}, ((),)],
        torch.empty(0, 3, dtype=torch.bfloat16),
        torch.tensor(2**63 + 1, dtype=torch.uint64),
    ],
    ids=lambda value: type(value).__name__,
)
def test_edges_come_back_bit_for_bit(value: Any, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"part": value}, about={})
    assert same(checkpoint.load(tmp_path / "c")[0]["part"], value)


def test_the_file_does_not_depend_on_the_order_of_names_and_tensors_are_aligned(tmp_path: Path) -> None:
    state = {
        "a": torch.ones(3, dtype=torch.bool),
        "b": torch.ones(1, dtype=torch.float64),
        "c": torch.ones(1, dtype=torch.bfloat16),
        "d": torch.ones(3),
    }
    checkpoint.save(tmp_path / "one", {"p": state}, about={})
    checkpoint.save(tmp_path / "two", {"p": dict(reversed(state.items()))}, about={})
    raw = (tmp_path / "one" / "p.safetensors").read_bytes()
    assert raw == (tmp_path / "two" / "p.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    for name, entry in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__":
            assert (8 + size + entry["data_offsets"][0]) % state[name].element_size() == 0


def test_what_was_loaded_does_not_follow_the_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"p": torch.ones(5000)}, about={})
    loaded = checkpoint.load(tmp_path / "c")[0]["p"]
    path = tmp_path / "c" / "p.safetensors"
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(loaded, torch.ones(5000))


def test_an_optimizer_a_generator_and_a_module_continue_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    opt = torch.optim.AdamW(net.parameters())
    rng = np.random.default_rng(7)
    net(torch.randn(5, 3)).square().sum().backward()
    opt.step()
    rng.random(3)
    parts = {"net": net.state_dict(), "opt": opt.state_dict(), "rng": rng.bit_generator.state}
    checkpoint.save(tmp_path / "c", parts, about={})
    loaded, _ = checkpoint.load(tmp_path / "c")
    assert rng.bit_generator.state["state"]["state"] > 2**64  # 128 bits, beyond every fixed-width integer
    assert list(loaded["opt"]["state"]) == [0, 1]  # integer keys, not "0"
    other = np.random.default_rng(0)
    other.bit_generator.state = loaded["rng"]
    assert other.random() == rng.random()
    twin = torch.nn.Linear(3, 2)
    twin.load_state_dict(loaded["net"])
    twin_opt = torch.optim.AdamW(twin.parameters())
    twin_opt.load_state_dict(loaded["opt"])
    for model, optimizer in ((net, opt), (twin, twin_opt)):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert torch.equal(net.weight, twin.weight)


def test_views_shared_memory_and_colliding_names_are_written_in_full(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = OrderedDict(
        z=base,
        a=base,
        column=base[:, 1],
        flipped=base.T,
        one=base[0].expand(3, 4),
        single=base[:1, :1].as_strided((1,), (0,)),
        conj=torch.tensor([1 + 2j]).conj(),
        fortran=np.asfortranarray(np.arange(6).reshape(2, 3)),
        backwards=np.arange(3)[::-1],
        readonly=np.broadcast_to(np.float32(2), (2, 2)),
    )
    state["p.q"], state["p"] = torch.ones(1), {"q": torch.zeros(1)}
    state["__metadata__"] = torch.ones(2)
    checkpoint.save(tmp_path / "c", {"policy": state}, about={})
    loaded = checkpoint.load(tmp_path / "c")[0]["policy"]
    assert list(loaded) == list(state)  # order kept although the file sorts its tensors
    for name, value in state.items():
        assert torch.equal(torch.as_tensor(loaded["p"]["q"]), torch.zeros(1))
        if isinstance(value, np.ndarray):
            assert isinstance(loaded[name], np.ndarray)
            np.testing.assert_array_equal(loaded[name], value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(loaded[name], value)
    loaded["z"].add_(1)  # writable, and its own memory
    assert torch.equal(loaded["a"], base)


def test_files_are_ordinary_safetensors_with_readable_names(tmp_path: Path) -> None:
    weights: dict[str, Any] = {"actor": torch.nn.Linear(2, 3).state_dict(), "half": torch.ones(3, dtype=torch.bfloat16)}
    checkpoint.save(tmp_path / "c", {"policy": weights, "config.yaml": "gamma: 0.99\n"}, about={"step": 3})
    by_package = load_file(tmp_path / "c" / "policy.safetensors")
    assert sorted(by_package) == ["actor.bias", "actor.weight", "half"]
    assert torch.equal(by_package["actor.weight"], weights["actor"]["weight"])
    assert (tmp_path / "c" / "config.yaml").read_bytes() == b"gamma: 0.99\n"
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "config.yaml",
        "manifest.json",
        "policy.json",
        "policy.safetensors",
    ]
    parts, about = checkpoint.load(tmp_path / "c", only=["config.yaml"])
    assert parts == {"config.yaml": "gamma: 0.99\n"}
    assert about == {"step": 3}
    with pytest.raises(CheckpointError, match=r"no part 'optimizer'; it has: config\.yaml, policy"):
        checkpoint.load(tmp_path / "c", only=["optimizer"])


def test_equal_states_give_equal_bytes_and_hash_whatever_about_says(tmp_path: Path) -> None:
    def state() -> dict[str, Any]:
        tensors = {f"t{i}": torch.full((i + 1,), float(i), dtype=d) for i, d in enumerate((torch.float32, torch.int64))}
        return {"a": {**tensors, "n": np.float64(0.1), "x": [1, (2, None)]}, "note.txt": "é"}

    one = checkpoint.save(tmp_path / "one", state(), about={"seconds": 1.5})
    two = checkpoint.save(tmp_path / "two", state(), about={"seconds": 9.0, "host": "ü"})
    for name in ("a.json", "a.safetensors", "note.txt"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert checkpoint.content_hash(one) == checkpoint.content_hash(two)
    changed = state()
    changed["a"]["t0"][0] = torch.nextafter(changed["a"]["t0"][0], torch.tensor(1.0))
    three = checkpoint.save(tmp_path / "three", changed, about={"seconds": 1.5})
    assert checkpoint.content_hash(three) != checkpoint.content_hash(one)


class Unknown:
    pass


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [0, {"b": Unknown()}]}, r"state `a\.1\.b`: cannot save a .*Unknown"),
        ({"raw": b"bytes"}, "state `raw`: cannot save a builtins.bytes"),
        ({"s": {1, 2}}, "state `s`"),
        ({"o": np.array([None])}, "state `o`: cannot save a numpy array of dtype object"),
        ({"sparse": torch.eye(2).to_sparse()}, "state `sparse`: cannot save a torch.sparse_coo"),
        ({"meta": torch.empty(2, device="meta")}, "state `meta`"),
        ({Unknown(): 1}, "key`: cannot save"),
        ({"f": signal.SIGTERM}, "state `f`"),  # an IntEnum would come back as an int
    ],
)
def test_what_cannot_be_saved_is_named_before_anything_is_written(tmp_path: Path, value: Any, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        checkpoint.save(tmp_path / "c", {"good": {"x": torch.ones(1)}, "bad": value}, about={})
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_contains_itself_is_an_error() -> None:
    state: dict[str, Any] = {}
    state["again"] = state
    with pytest.raises(TypeError, match="contains itself"):
        checkpoint.encode(state)


@pytest.mark.parametrize("name", ["../x.txt", "a/b.txt", ".hidden.txt", "manifest.json", "code.pkl", ""])
def test_parts_need_plain_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError):
        checkpoint.save(tmp_path / "c", {name: "text"}, about={})
    with pytest.raises(ValueError):
        checkpoint.save(tmp_path / "c", {"x": {}, "x.json": "text"}, about={})
    assert list(tmp_path.iterdir()) == []


# --- a run's checkpoints -------------------------------------------------------------------------------------------


def parts_at(step: int) -> dict[str, Any]:
    return {
        "policy": {"weight": torch.full((50,), float(step))},
        "state": {"step": step},
        "config.yaml": "seed: 0\n",
    }


def write(run: Path, *steps: int) -> list[Path]:
    folders = [checkpoint.checkpoint_folder(run, step) for step in steps]
    return [checkpoint.save(f, parts_at(s), about={"step": s}) for f, s in zip(folders, steps, strict=True)]


def step_of(folder: Path) -> int:
    """Load the checkpoint and check that all of its parts are of one step."""
    parts, about = checkpoint.load(folder)
    step = parts["state"]["step"]
    assert same(parts, dict(sorted(parts_at(step).items())))
    assert about["step"] == step
    return int(step)


FILES = ["policy.safetensors", "policy.json", "state.json", "config.yaml", "manifest.json"]


def flip(path: Path, rng: np.random.Generator) -> None:
    raw = bytearray(path.read_bytes())
    raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
    path.write_bytes(raw)


def test_names_of_folders(tmp_path: Path) -> None:
    assert checkpoint.checkpoint_folder(tmp_path, 10_000) == tmp_path / "checkpoints" / "step-0000010000"
    _, _, last = write(tmp_path, 9, 100_000_000_000, 10)  # by number, not by name
    folder, messages = checkpoint.newest(tmp_path)
    assert folder.name == "step-100000000000"
    assert messages == []
    assert last.name == "step-0000000010"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncate", "empty", "grow", "delete", "link", "folder", "flip"])
def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_used(tmp_path: Path, name: str, how: str) -> None:
    _, last = write(tmp_path, 300, 400)
    path, rng = last / name, np.random.default_rng(0)
    raw = path.read_bytes()
    for _ in range(25 if how == "flip" else 1):
        path.unlink()
        path.write_bytes(raw)
        if how == "truncate":
            path.write_bytes(raw[:-1])
        elif how == "empty":
            path.write_bytes(b"")
        elif how == "grow":
            path.write_bytes(raw + b" ")
        elif how == "flip":
            flip(path, rng)
        else:
            path.unlink()
            if how == "link":
                copy = tmp_path / "elsewhere"
                copy.write_bytes(raw)
                path.symlink_to(copy)
            elif how == "folder":
                path.mkdir()
        reason = checkpoint.verify(last)
        assert reason is not None
        assert name in reason
        folder, messages = checkpoint.newest(tmp_path)
        assert step_of(folder) == 300
        assert messages == [f"checkpoint step-0000000400 incomplete ({reason}); using step-0000000300"]
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load(last)
    if how == "truncate" and name != "manifest.json":
        assert "hash mismatch in " + name in str(reason)


def test_swapped_files_and_a_swapped_manifest_are_found(tmp_path: Path) -> None:
    first, last = write(tmp_path, 3, 4)
    (first / "state.json").rename(tmp_path / "x")
    (last / "state.json").rename(first / "state.json")
    (tmp_path / "x").rename(last / "state.json")
    assert checkpoint.verify(first) == checkpoint.verify(last) == "hash mismatch in state.json"
    shutil.copy(first / "manifest.json", last / "manifest.json")
    assert checkpoint.verify(last) == "hash mismatch in policy.safetensors"
    with pytest.raises(
        CheckpointError, match=r"no complete checkpoint .*step-0000000004 .*; checkpoint step-0000000003"
    ):
        checkpoint.newest(tmp_path)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint.newest(tmp_path / "nothing")


def test_load_of_some_parts_reads_only_their_files(tmp_path: Path) -> None:
    (folder,) = write(tmp_path, 1)
    (folder / "policy.safetensors").unlink()
    parts, _ = checkpoint.load(folder, only=["state", "config.yaml"])
    assert parts == {"state": {"step": 1}, "config.yaml": "seed: 0\n"}
    with pytest.raises(CheckpointError, match=r"policy\.safetensors is missing"):
        checkpoint.load(folder, only=["policy"])


def in_child_killed_at(count: int, run: Path, step: int) -> bool:
    """Save in a forked process that kills itself before its `count`-th file operation; -> whether it got that far."""
    child = os.fork()
    if child == 0:
        try:
            seen, fsync = 0, os.fsync

            def tick() -> None:
                nonlocal seen
                seen += 1
                if seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)

            def audit(event: str, _: Any) -> None:
                if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir"):
                    tick()

            def counted_fsync(handle: Any) -> None:  # fsync raises no audit event
                tick()
                fsync(handle)

            sys.addaudithook(audit)
            os.fsync = counted_fsync  # type: ignore[assignment]
            state = {**parts_at(step), "extra": {"new": True}}
            checkpoint.save(checkpoint.checkpoint_folder(run, step), state, about={"step": step})
            checkpoint.prune(run, 2)
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("before", "step"), [([5], 5), ([5], 9), ([3, 4, 5], 6)], ids=["same step", "next step", "with pruning"]
)
def test_a_kill_at_any_file_operation_leaves_a_complete_checkpoint(
    tmp_path: Path, before: list[int], step: int
) -> None:
    outcomes: list[str] = []
    for count in range(1, 500):
        run = tmp_path / str(count)
        write(run, *before)
        killed = in_child_killed_at(count, run, step)
        parts, about = checkpoint.load(checkpoint.resolve(run)[0])
        expected = parts_at(about["step"])
        if "extra" in parts:  # the new state, whole
            assert about["step"] == step
            expected = {**expected, "extra": {"new": True}}
        else:  # the old one, whole
            assert about["step"] == before[-1]
        assert same(parts, dict(sorted(expected.items())))
        outcomes.append("new" if "extra" in parts else "old")
        # The next process saves that step again and cleans up: one folder a step, nothing hidden.
        write(run, step)
        assert checkpoint.prune(run, 2) is None
        names = sorted(p.name for p in (run / "checkpoints").iterdir())
        kept = sorted({*before, step})[-2:]
        assert names == [f"step-{s:010d}" for s in kept]
        if not killed:
            break
    else:
        pytest.fail("the save never ended")
    assert len(outcomes) > 20
    turn = outcomes.index("new")  # there is one moment at which the new checkpoint replaces the old one
    assert outcomes == ["old"] * turn + ["new"] * (len(outcomes) - turn)


def test_a_folder_that_was_being_replaced_is_found_under_its_old_name(tmp_path: Path) -> None:
    (folder,) = write(tmp_path, 8)
    folder.rename(folder.with_name(".old-step-0000000008-2"))
    (tmp_path / "checkpoints" / ".old-step-0000000008-1").mkdir()
    found, messages = checkpoint.newest(tmp_path)
    assert found.name == ".old-step-0000000008-2"
    assert step_of(found) == 8
    assert messages == [
        "checkpoint step-0000000008 was being replaced; using .old-step-0000000008-2, its content before"
    ]
    assert checkpoint.resolve(folder)[:2] == (found, tmp_path.resolve())


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = write(tmp_path, 1)
    for failing in range(1, 7):  # 5 files and the folder
        calls: list[int] = []
        fsync = os.fsync

        def full(handle: int, calls: list[int] = calls, failing: int = failing, fsync: Any = fsync) -> None:
            calls.append(handle)
            if len(calls) == failing:
                raise OSError(28, "No space left on device")
            fsync(handle)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(folder, parts_at(2), about={"step": 2})
        monkeypatch.setattr(os, "fsync", fsync)
        assert [p.name for p in folder.parent.iterdir()] == [folder.name]
        assert step_of(folder) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_os_error() -> None:
    chunks = checkpoint._safetensors({"x": torch.zeros(1 << 16)})
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        file.writelines(chunks)


def test_prune_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    folders = write(tmp_path, 1, 2, 3, 4, 5)
    shutil.copytree(folders[4], folders[4].with_name(".old-step-0000000005-1"))  # killed while deleting it
    (folders[3] / "state.json").unlink()  # 4 does not count, but is newer than what is kept
    mine = folders[0].with_name(f".tmp-step-0000000009-{os.getpid()}")
    alive = folders[0].with_name(f".tmp-step-0000000009-{os.getppid()}")
    dead = folders[0].with_name(".tmp-step-0000000009-999999999")
    for folder in (mine, alive, dead, tmp_path / "checkpoints" / "notes"):
        folder.mkdir()
    assert checkpoint.prune(tmp_path, 0) is None  # 0 keeps all
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {*(f.name for f in folders), alive.name, "notes"}
    assert checkpoint.prune(tmp_path, 2) is None
    kept = {folders[2].name, folders[3].name, folders[4].name, alive.name, "notes"}
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == kept
    assert checkpoint.prune(tmp_path / "nothing", 1) is None


def test_prune_deletes_nothing_when_nothing_is_complete(tmp_path: Path) -> None:
    folders = write(tmp_path, 1, 2)
    for folder in folders:
        (folder / "manifest.json").unlink()
    assert checkpoint.prune(tmp_path, 1) is None
    assert all(folder.exists() for folder in folders)


def test_prune_failure_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, last = write(tmp_path, 1, 2, 3)
    rmtree = shutil.rmtree

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        if path == first:
            raise PermissionError(13, "Permission denied", str(path))
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    warning = checkpoint.prune(tmp_path, 1)
    assert warning is not None
    assert first.name in warning
    assert "Permission denied" in warning
    assert not second.exists()  # the others are still deleted
    assert step_of(last) == 3


# --- where things are ----------------------------------------------------------------------------------------------


def test_resolve_takes_a_run_a_checkpoint_and_a_saved_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    first, last = write(run, 1, 2)
    saved = checkpoint.save(tmp_path / "my model é", parts_at(7), about={"step": 7})
    assert checkpoint.resolve(run) == (last, run, [])
    assert checkpoint.resolve(run / "checkpoints")[0].name == last.name
    assert checkpoint.resolve(first) == (first, run.resolve(), [])
    assert checkpoint.resolve(saved) == (saved, None, [])
    assert checkpoint.resolve(saved / "manifest.json")[0] == saved
    (last / "state.json").write_text("{}")
    folder, _, messages = checkpoint.resolve(run)
    assert folder == first
    assert messages[0].startswith("checkpoint step-0000000002 incomplete (hash mismatch in state.json")
    monkeypatch.chdir(run / "checkpoints" / first.name)
    assert checkpoint.resolve(".")[1] == run.resolve()


def test_resolve_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        checkpoint.resolve(tmp_path / "missing")
    with pytest.raises(UserError, match=r"looked for manifest\.json .* checkpoints/step-\* and config\.yaml"):
        checkpoint.resolve(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0")
    (tmp_path / "checkpoints" / ".tmp-step-0000000005-999999999").mkdir(parents=True)  # killed in its first save
    assert not checkpoint.has_checkpoints(tmp_path)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoint.resolve(tmp_path)
    (folder,) = write(tmp_path, 1)
    assert checkpoint.has_checkpoints(tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*manifest\.json is missing"):
        checkpoint.resolve(tmp_path)


def test_saving_never_deletes_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    checkpoint.save(project, parts_at(1), about={"step": 1})  # an empty folder is fine
    checkpoint.save(project, parts_at(2), about={"step": 2})  # and so is a checkpoint
    assert step_of(project) == 2
    (project / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        checkpoint.save(project, parts_at(3), about={"step": 3})
    (project / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.save(project, parts_at(3), about={"step": 3})
    with pytest.raises(UserError, match="a file of that name"):
        checkpoint.save(project / "thesis.tex", parts_at(3), about={})
    assert (project / "thesis.tex").read_text() == "years of work"
    # In a run the name says that it is ours, even when it is damaged: training that comes by again repairs it.
    (folder,) = write(tmp_path / "run", 4)
    (folder / "manifest.json").unlink()
    write(tmp_path / "run", 4)
    assert step_of(folder) == 4


# --- folders from strangers ----------------------------------------------------------------------------------------


def forge(folder: Path, files: dict[str, bytes], more: dict[str, Any] | None = None) -> Path:
    """A folder whose hashes are all right: only its content is malformed. `more` are entries without a file."""
    folder.mkdir()
    entries = dict(more or {})
    for name, raw in files.items():
        part = name.removesuffix(".json").removesuffix(".safetensors")
        entries[name] = {**checkpoint._write(folder / name, [raw]), "part": part}
    (folder / "manifest.json").write_bytes(checkpoint._manifest_bytes({"files": entries, "about": {}}))
    return folder


EMPTY = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
GOOD = b"".join(bytes(chunk) for chunk in checkpoint._safetensors({"w": torch.ones(4)}))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b.json", "..", "C:\\x", "a\\b", ".hidden", "", "a\n"])
def test_a_manifest_cannot_name_files_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"")
    folder = forge(tmp_path / "c", {}, more={name: {**EMPTY, "part": name}})
    with pytest.raises(CheckpointError, match=r"refused: .* is not a plain file name"):
        checkpoint.load(folder)


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.json": b"{"}, r"x\.json: not JSON"),
        ({"x.json": b"\xff\xfe"}, r"x\.json: not JSON"),
        ({"x.json": DEEP}, r"x\.json: not JSON"),
        ({"x.json": b'{"a":' * 990 + b"1" + b"}" * 990}, r"x\.json: (malformed|not JSON)"),
        ({"x.json": b'{"$tuple":[' * 480 + b"]}" * 480}, r"x\.json: (malformed|not JSON)"),
        ({"x.json": b"1" * 5000}, r"x\.json: not JSON"),
        ({"x.json": b'{"$tensor": "w"}'}, r"x\.json: malformed state: it refers to 'w'"),
        ({"x.json": b'[{"$tensor": "w"}, {"$tensor": "w"}]', "x.safetensors": GOOD}, "refers to 'w'"),
        ({"x.json": b'{"$tensor": ["w"]}', "x.safetensors": GOOD}, "malformed state"),
        ({"x.json": b'{"$tensor": "w", "complex": true}', "x.safetensors": GOOD}, "malformed state"),
        ({"x.json": b'{"$array": "w", "dtype": "|O8", "shape": [2]}', "x.safetensors": GOOD}, "numpy dtype '|O8'"),
        ({"x.json": b'{"$array": "w", "dtype": "<f8", "shape": [9]}', "x.safetensors": GOOD}, "malformed state"),
        ({"x.json": b'{"$scalar": "O", "hex": "00"}'}, "numpy dtype 'O'"),
        ({"x.json": b'{"$scalar": "<f8", "hex": "00"}'}, "malformed state"),
        ({"x.json": b'{"$unknown": 1}'}, "unknown"),
        ({"x.json": b'{"$dict": [[[1], 2]]}'}, "malformed state"),
        ({"x.json": b'{"$dict": 7}'}, "malformed state"),
        ({"x.json": b'{"$int": "z"}'}, "malformed state"),
        ({"x.json": b'{"$float": "00"}'}, "malformed state"),
        ({"x.json": b'{"$str": "f"}'}, "malformed state"),
        ({"x.json": b"1", "x.safetensors": b""}, r"x\.safetensors: not a safetensors file"),
        ({"x.json": b"1", "x.safetensors": b"PK\x03\x04" + b"0" * 64}, r"x\.safetensors: not a safetensors file"),
        ({"x.json": b"1", "x.safetensors": b"\xff" * 8 + b"{}"}, r"x\.safetensors: not a safetensors file"),
        (
            {"x.json": b"1", "x.safetensors": header(w={"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 4]})},
            r"x\.safetensors: not a safetensors file",
        ),
        (
            {"x.json": b"1", "x.safetensors": header(w={"dtype": "F99", "shape": [1], "data_offsets": [0, 1]}) + b"1"},
            r"x\.safetensors: not a safetensors file",
        ),
        ({"x.safetensors": GOOD}, r"lists no x\.json"),
        ({"x.txt": b"\xff"}, r"x\.txt: not UTF-8"),
        ({"x.pkl": b"\x80\x04."}, "refused: 'x.pkl': a pickle can run code"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_malformed_content_with_right_hashes_is_a_typed_error(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    folder = forge(tmp_path / "c", files)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a manifest"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"format": "other"}', "not a manifest"),
        ('{"format": "rlkit checkpoint", "version": 2}', "version 2 is newer than this rlkit reads"),
        ('{"format": "rlkit checkpoint", "version": 1}', "lists no files"),
        ('{"format": "rlkit checkpoint", "version": 1, "about": {}, "files": {"a": 1}}', "malformed entry 'a'"),
        ('{"format": "rlkit checkpoint", "version": 1, "about": {}, "files": {}}', "hash mismatch in .*manifest"),
        (
            '{"format": "rlkit checkpoint", "version": 1, "about": {"a": ' + "[" * 700 + "]" * 700 + '}, "files": {}}',
            "manifest",
        ),
    ],
    ids=lambda text: text[-30:],
)
def test_malformed_manifests_are_typed_errors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path)


def test_sizes_are_compared_before_anything_is_read(tmp_path: Path) -> None:
    (folder,) = write(tmp_path, 1)
    os.truncate(folder / "policy.safetensors", 1 << 40)  # a terabyte, sparse
    assert str(checkpoint.verify(folder)).startswith("hash mismatch in policy.safetensors: 1099511627776 bytes")
    os.truncate(folder / "manifest.json", 1 << 40)
    assert "larger than 16 MiB" in str(checkpoint.verify(folder))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    (folder,) = write(tmp_path, 1)
    for name in ("state.json", "manifest.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError, match=rf"{name} is not a regular file"):
            checkpoint.load(folder)


class Bomb:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "name", ["model.pt", "model.zip", "policy.pkl", "weights.bin", "innocent", "policy.safetensors"]
)
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    path, sprung = tmp_path / name, tmp_path / "sprung"
    if name == "model.zip":
        torch.save({"x": Bomb(sprung)}, path)
        assert path.read_bytes()[:2] == b"PK"
    else:
        path.write_bytes(pickle.dumps(Bomb(sprung)))
    for read in (checkpoint.load, checkpoint.resolve):
        with pytest.raises(CheckpointError, match=r"refused: .* a pickle can run code; only folders written by `save`"):
            read(path)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Bomb(sprung)))  # the bomb does work
    assert sprung.exists()


def test_nothing_on_the_way_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("pickle")

    for module in (pickle, sys.modules.get("cloudpickle"), vars(torch.serialization)["pickle"]):
        for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
            if module is not None and hasattr(module, name):
                monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(torch, "save", forbidden)
    monkeypatch.setattr(np, "load", forbidden)
    write(tmp_path, 1, 2)
    assert step_of(checkpoint.resolve(tmp_path)[0]) == 2
