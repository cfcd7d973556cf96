"""Causal language models in and out: loading, adapters, identity, and the files of a Hugging Face folder.

Loading takes safetensors only and never runs code of a repository. A checkpoint of a language trainer is itself a
folder that `transformers` loads: `model.safetensors` under the model's own names with the text files of `documents`, or
`adapter_model.safetensors` with `adapter_config.json` where an adapter was trained.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rlkit import checkpoint
from rlkit.errors import CheckpointError, UserError, did_you_mean
from rlkit.lm.logps import positions
from rlkit.lm.sharding import divided_like, is_divided, whole
from rlkit.products import checkpoint_contexts

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "default"  # peft's name of a model's first adapter


def load_model(source: str, *, attn_implementation: str | None = None, what: str = "model") -> PreTrainedModel:
    """The causal language model in a folder, or under a hub name, in float32 and in evaluation mode.

    A folder with an adapter gives the base model with that adapter, trainable.

    Args:
        what: the field that names it, for messages.

    Raises:
        UserError: nothing there, no safetensors, damaged, lacking or non-finite weights, or no causal language model.
    """
    from transformers import AutoModelForCausalLM

    kwargs: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    folder = folder_of(what, source, "adapter_config.json", "config.json")
    if folder is not None and is_adapter_folder(source):
        base = _base_of(what, folder, "CAUSAL_LM")
        model: Any = load_model(base, attn_implementation=attn_implementation, what=what)
        if any((folder / name).exists() for name in _TOKENIZERS):  # tokens that were added for the adapter
            size, rows = len(load_tokenizer(str(folder))), model.get_input_embeddings().weight.shape[0]
            if size > rows:
                model.resize_token_embeddings(size)
        return _with_saved_adapter(what, model, folder)[0]
    return _weights(what, source, AutoModelForCausalLM, kwargs)[0]


def load_classifier(
    source: str,
    *,
    attn_implementation: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    what: str = "model",
) -> tuple[nn.Module, list[str]]:
    """A sequence classifier with one label; of a causal language model, its body with a new head.

    A folder with an adapter gives the base model with that adapter, trainable.

    Args:
        dtype: of the weights; "auto" keeps the files' own.
        what: the field that names it, for messages.

    Returns:
        (model, names of the weights that are in no file: they were drawn at random, from torch's own stream).

    Raises:
        UserError: as `load_model`, or the classifier there has several labels, or its adapter is of another kind.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = folder_of(what, source, "adapter_config.json", "config.json")
    adapter = folder if folder is not None and is_adapter_folder(source) else None
    base = source if adapter is None else _base_of(what, adapter, "SEQ_CLS")
    config = _tried(what, base, AutoConfig.from_pretrained)
    classifies = any("Classification" in name for name in config.architectures or ())
    if classifies and config.num_labels != 1:
        raise UserError(f"`{what}`: {base} is a classifier with {config.num_labels} labels; a reward model has one")
    kwargs: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _quiet():  # transformers warns of the head, which the caller mentions
        model, new = _weights(
            what, base, AutoModelForSequenceClassification, {**kwargs, "num_labels": 1, "dtype": dtype}, new_head=True
        )
    if adapter is not None:
        model, saved = _with_saved_adapter(what, model, adapter)
        new -= saved
    if classifies and new:
        raise UserError(f"`{what}`: cannot load {base}: its files lack {_some(new)}; copy or download it again")
    return model, sorted(new)


def is_adapter_folder(source: str) -> bool:
    """Whether a local folder holds an adapter of peft."""
    return (path_of(source) / "adapter_config.json").exists()


def _base_of(what: str, folder: Path, task_type: str) -> str:
    """The model that the adapter in a folder belongs to.

    Raises:
        UserError: it names none, one that is not there, or is an adapter for another task.
    """
    from peft import PeftConfig

    check_files(what, folder)
    config = _tried(what, str(folder), PeftConfig.from_pretrained, trusts=False)
    if config.task_type not in (None, task_type):
        raise UserError(
            f"`{what}`: the adapter in {folder} is for {config.task_type}; expected one for {task_type}: merge it into "
            "its model first (`save(folder, merged=True)`), and give that folder"
        )
    base = config.base_model_name_or_path
    if not base:
        raise UserError(
            f"`{what}`: adapter_config.json of {folder} names no base model (`base_model_name_or_path`), as where it "
            "was an object in Python or the embedded task's; name it there, or merge the adapter first: "
            "`rlkit.load(run).save(folder, merged=True)`"
        )
    try:
        folder_of(what, base)
    except UserError as error:
        raise UserError(
            f"`{what}`: the base model of the adapter in {folder} is gone: there is no {base}; where it moved, "
            "name the new place in the folder's adapter_config.json (`base_model_name_or_path`)"
        ) from error
    return str(base)


def _with_saved_adapter(what: str, model: nn.Module, folder: Path) -> tuple[Any, set[str]]:
    """(`model` with the adapter in a folder, names of the model's own weights that the adapter brings)."""
    from peft import PeftModel

    def load(place: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # as in `add_adapter`
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, place, is_trainable=True)

    adapted: Any = _tried(what, str(folder), load, trusts=False)
    check_finite(what, str(folder), adapted)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    return adapted, {name.removeprefix("base_model.model.") for name in names}


def _some(names: Iterable[str]) -> str:
    """The first three of `names`, and how many more there are."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without warnings, for a while."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def classifier_of(model: nn.Module) -> PreTrainedModel:
    """A sequence classifier with one label on the body of a causal language model, which is copied."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(unwrapped(model).config)
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.base_model.load_state_dict(unwrapped(model).base_model.state_dict())
    return classifier


def pad_as(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a classifier the padding token, as TRL does: the tokenizer's, else its end token.

    transformers reads a row at its last token that is another one.
    """
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    unwrapped(model).config.get_text_config().pad_token_id = padding


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or under a hub name.

    Raises:
        UserError: nothing there, or something that is no tokenizer.
    """
    from transformers import AutoTokenizer

    folder = folder_of("tokenizer", source)
    if folder is not None and not any((folder / name).exists() for name in _TOKENIZERS):
        raise UserError(
            f"`tokenizer`: {source} holds no tokenizer (tokenizer.json or the like); name the folder of the one that "
            "the model was trained with, `--tokenizer FOLDER`"
        )
    tokenizer: PreTrainedTokenizerBase = _tried("tokenizer", source, AutoTokenizer.from_pretrained)
    return tokenizer


def check_same_tokens(what: str, source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """See that a model in a local folder that brings a tokenizer was trained on the tokens of `tokenizer`.

    Args:
        what: the field that names the model, for messages.
        source: its folder; a hub name, or a folder without tokenizer, is not looked at.

    Raises:
        UserError: an id that both have stands for different tokens.
    """
    folder = path_of(source)
    if not any((folder / name).exists() for name in _TOKENIZERS):
        return
    own = {number: token for token, number in tokenizer.get_vocab().items()}
    other = {number: token for token, number in load_tokenizer(source).get_vocab().items()}
    differ = sorted(number for number in own.keys() & other.keys() if own[number] != other[number])
    if differ:
        first = differ[0]
        raise UserError(
            f"`{what}`: {source} has another tokenizer than the model: {len(differ):,} tokens differ, such as token "
            f"{first}, {other[first]!r} there and {own[first]!r} here; take a reference with the model's tokens"
        )


def set_attention(model: nn.Module, implementation: str) -> None:
    """Let a model that was given as an object use another attention of transformers.

    Raises:
        UserError: it does not have that one.
    """
    try:
        unwrapped(model).set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"`attn_implementation`: {implementation} is not possible with this model: {reason}") from error


def check_fits(model: nn.Module, what: str, highest: int, longest: int) -> None:
    """See that a model can take token rows.

    Args:
        what: the field that the model came from, for the message.
        highest: the largest token id of the rows.
        longest: tokens of the longest row.

    Raises:
        UserError: an id beyond the model's vocabulary, or a row longer than its positions.
    """
    rows = unwrapped(model).get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise UserError(
            f"`{what}`: the tokenizer makes token {highest} of the data, and the model has {rows} (0 to {rows - 1}): "
            "tokenizer and model do not belong together; name the right one, `--tokenizer FOLDER`"
            + (f", or another `--{what}`" if what != "model" else "")
        )
    limit = positions(model)
    if limit is not None and limit < longest:
        raise UserError(
            f"`{what}`: the longest row has {longest} tokens, the model {limit} positions; cut rows with "
            f"`--max_length {limit}`, or take a model with more"
        )


_TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "vocab.json", "vocab.txt", "tekken.json",
)  # fmt: skip
"""Files of which a tokenizer's folder has at least one."""
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def folder_of(what: str, source: str, *needs: str) -> Path | None:
    """The local folder that a name stands for; None for a name on the hub.

    Args:
        needs: files of which the folder has to have one.

    Raises:
        UserError: a path that does not exist, or a folder without these files.
    """
    path = path_of(source)
    if path.is_file():
        raise UserError(f"`{what}`: {source} is a file; expected a folder that `save_pretrained` wrote")
    if path.is_dir():
        if needs and not any((path / name).exists() for name in needs):
            raise UserError(
                f"`{what}`: cannot load {source}: it has no {needs[-1]}; expected a folder that `save_pretrained` wrote"
            )
        return path
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        raise UserError(f"`{what}`: there is no {source}{did_you_mean(path.name, _folders(path.parent))}")
    return None


def path_of(source: str) -> Path:
    """The path that a text names; where `~` stands for nobody's home, the text as it is."""
    try:
        return Path(source).expanduser()
    except RuntimeError:  # the home of somebody unknown
        return Path(source)


def _folders(place: Path) -> list[str]:
    return [p.name for p in place.iterdir() if p.is_dir()] if place.is_dir() else []


def check_files(what: str, folder: Path) -> None:
    """See that a local folder's weights are safetensors, and whole.

    Raises:
        UserError: pickled weights only, none at all, or a damaged file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
        if pickled:
            raise UserError(
                f"`{what}`: cannot load {folder}: refused: {pickled[0]} is a pickle, and a pickle can run code; "
                "expected *.safetensors. Where you trust it, convert it in Python with transformers: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        raise UserError(f"`{what}`: cannot load {folder}: it holds no weights (*.safetensors); copy the folder again")
    for path in files:
        try:
            with safe_open(path, "pt"):  # reads the header, and compares the file's size with it
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"`{what}`: {path} is damaged or incomplete ({error}); copy or download it again"
            ) from error


def _weights(
    what: str, source: str, auto: Any, kwargs: Mapping[str, Any], *, new_head: bool = False
) -> tuple[Any, set[str]]:
    """(a model of the class `auto`, names of the weights that are in no file).

    Args:
        new_head: what is not in the model's body, and its pooler, may be absent and is then drawn at random.

    Raises:
        UserError: it cannot be loaded, or weights are absent, of another shape, or not finite.
    """
    folder = folder_of(what, source, "config.json")
    if folder is not None:
        check_files(what, folder)
    model, report = _tried(
        what,
        source,
        auto.from_pretrained,
        use_safetensors=True,
        **{"dtype": torch.float32, **kwargs},
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # said below, and with names
    )
    other = sorted(report["mismatched_keys"])
    if other:
        name, found, expected = other[0]
        raise UserError(
            f"`{what}`: cannot load {source}: {name} is {tuple(found)}, config.json makes it {tuple(expected)}; "
            "weights and configuration do not belong together, so copy the folder again"
        )
    body = f"{model.base_model_prefix}."
    new = set(report["missing_keys"])
    lost = {name for name in new if not new_head or (name.startswith(body) and ".pooler." not in name)}
    if lost:
        raise UserError(
            f"`{what}`: cannot load {source}: its files lack {_some(lost)}: it is a model of another kind, or "
            "incomplete; then copy or download it again"
        )
    check_finite(what, source, model)
    return model, new


def check_finite(what: str, source: str, model: nn.Module) -> None:
    """See that every weight is a number.

    Raises:
        UserError: one is NaN or infinite.
    """
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"`{what}`: {source}: `{name}` holds NaN or infinity, so training it leads nowhere; take an earlier "
                "checkpoint"
            )


def _tried(what: str, source: str, load: Any, *, trusts: bool = True, **kwargs: Any) -> Any:
    """What `load` makes of a folder or a hub name; it never runs code of a repository, nor asks whether to.

    Args:
        trusts: whether `load` has the option to.

    Raises:
        UserError: it failed, whatever the library or the file's parser raised.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    if trusts:
        kwargs["trust_remote_code"] = False
    path = path_of(source)
    try:
        return load(str(path) if path.exists() else source, **kwargs)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        near = did_you_mean(source, _folders(Path()))
        where = "" if path.exists() else f" (no folder here{near if 'did you mean' in near else ''})"
        raise UserError(
            f"`{what}`: cannot load {source}{where}: {reason}; expected a folder that `save_pretrained` wrote, or a "
            "name on the hub (weights as safetensors)"
        ) from error


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute activations in the backward pass."""
    base: Any = unwrapped(model)
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    if is_adapted(model):  # frozen embeddings give nothing that needs a gradient, which recomputation starts from
        base.enable_input_require_grads()


def own_memory(model: nn.Module) -> None:
    """Give every weight memory of PyTorch's own allocator.

    Weights straight from a file lie wherever the file has them, and matrix products of other alignment round otherwise:
    a resumed run would differ in the last bit.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model under an adapter."""
    return model.get_base_model() if is_adapted(model) else model  # type: ignore[operator]


def is_adapted(model: nn.Module) -> bool:
    """Whether `model` is a peft model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def add_adapter(model: PreTrainedModel, config: PeftConfig) -> nn.Module:
    """`model` with a new adapter in float32; everything else is frozen.

    Raises:
        UserError: the configuration does not fit the model (no such module, for one).
    """
    from peft import get_peft_model

    try:
        with warnings.catch_warnings():  # what peft asks transformers for is about to be renamed: nothing to do here
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, config)
    except (ValueError, KeyError) as error:
        raise UserError(f"`peft_config`: {str(error).strip().splitlines()[0]}") from error


def without_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, so that policy and reference see the same network.

    Besides `nn.Dropout` modules, models keep probabilities of their own and pass them to functions.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout", "dropout_p", "resid_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def named_weights(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors that make the model, under their names in its files; a tied tensor once.

    Args:
        values: what stands for the model's own tensors, by name; names that it lacks are left out.
    """
    tensors: dict[str, Tensor] = {}
    places: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        place = (id(tensor) if is_divided(tensor) else tensor.data_ptr(), tensor.shape)
        if tensor.numel() and place in places:
            continue
        places.add(place)
        tensors[name] = tensor.detach()
    return tensors if values is None else {name: values[name] for name in tensors if name in values}


def adapter_weights(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of the trained adapter, under the names that peft gives them in `adapter_model.safetensors`.

    Args:
        values: as in `named_weights`.
    """
    from peft import get_peft_model_state_dict

    if values is not None and not values:
        return {}
    return dict(get_peft_model_state_dict(model, state_dict=values, adapter_name=ADAPTER))


def set_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` (of `named_weights`) into `model`.

    Raises:
        CheckpointError: names or shapes differ.
    """
    _copy_into(named_weights(model), tensors, "model")


def set_adapter_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` (of `adapter_weights`) into the adapter of `model`.

    Raises:
        CheckpointError: names or shapes differ.
    """
    own = adapter_weights(model)
    if any(is_divided(tensor) for tensor in own.values()):
        _copy_into(own, tensors, "adapter")
        return
    from peft import set_peft_model_state_dict

    _check_names(own, tensors, "adapter")
    set_peft_model_state_dict(model, dict(tensors), adapter_name=ADAPTER)  # some kinds compute what they save


def _copy_into(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    _check_names(own, tensors, what)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(divided_like(own[name], tensor))


def _check_names(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise CheckpointError(f"the {what} has other weights than the checkpoint: {', '.join(odd[:5])}")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"`{name}` of the checkpoint is {tuple(tensor.shape)}, the {what}'s is {tuple(own[name].shape)}"
            )


def weights_hash(model: nn.Module, *, adapter: bool = True) -> str:
    """32 hexadecimal digits: equal for two models exactly when names, shapes, types and values of all weights are.

    Args:
        adapter: False leaves an adapter out, as if the model had never got one.
    """
    weights = named_weights(model if adapter else unwrapped(model))
    if not adapter:  # peft moves a layer it adapts to `base_layer`, beside `lora_A.default` and the like
        kept = {name: tensor for name, tensor in weights.items() if f".{ADAPTER}." not in f"{name}."}
        weights = {name.replace(".base_layer.", "."): tensor for name, tensor in kept.items()}
    return checkpoint.tensors_hash((name, whole(tensor)) for name, tensor in sorted(weights.items()))


def files_hash(path: Path) -> str:
    """32 hexadecimal digits over a file's bytes, or a folder's files (of a model: configuration and weights)."""
    digest = hashlib.blake2b(digest_size=16)
    if path.is_file():
        files = [path]
    else:
        files = sorted(p for p in path.rglob("*") if p.is_file() and ".git" not in p.parts)
        weights = [p for p in files if p.suffix in (".safetensors", ".json")]
        files = weights if any(p.suffix == ".safetensors" for p in weights) else files
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapter, for a while."""
    with model.disable_adapter():  # type: ignore[operator]
        yield


def save_merged(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a copy of the model with its adapter merged into the weights, as a Hugging Face folder."""
    merged = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def documents(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """File name -> text of what makes weights a Hugging Face folder: configuration, tokenizer, adapter's configuration.

    Raises:
        UserError: the tokenizer writes a file that is no text (an old slow one).
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tokenizer.save_pretrained(folder)
        if is_adapted(model):
            config: Any = model.peft_config[ADAPTER]  # type: ignore[index]
            inference, config.inference_mode = config.inference_mode, True
            config.save_pretrained(folder)
            config.inference_mode = inference
        base = unwrapped(model)
        base.config.architectures, base.config.dtype = [type(base).__name__], base.dtype
        if not is_adapted(model):
            base.config.save_pretrained(folder)
        if not is_adapted(model) and base.can_generate():
            base.generation_config.save_pretrained(folder)
        files: dict[str, str] = {}
        for path in sorted(place.rglob("*")):
            if path.is_file():
                try:
                    files[path.name] = _portable(path)
                except UnicodeDecodeError:
                    raise UserError(
                        f"`tokenizer`: {type(tokenizer).__name__} writes {path.name}, which is no text; use a fast one"
                    ) from None
        return files


def _portable(path: Path) -> str:
    """A file's text such that equal runs write equal files.

    Left out is what a tokenizer notes about where it was loaded from. Names of modules, which peft keeps as sets, in
    the order of a process's hashes, and those of a classifier's head once more with every loading, are sorted.
    """
    text = path.read_text(encoding="utf-8")
    if path.name == "tokenizer_config.json":
        own = ("is_local", "local_files_only", "name_or_path")
        fields = {k: v for k, v in json.loads(text).items() if k not in own}
    elif path.name == "adapter_config.json":
        sets = ("target_modules", "modules_to_save", "exclude_modules", "target_parameters")
        found = json.loads(text)
        fields = {k: sorted(set(v)) if k in sets and isinstance(v, list) else v for k, v in found.items()}
    else:
        return text
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def card(name: str, paper: str, facts: Mapping[str, Any], config: str) -> str:
    """A model card (README.md): how the weights came about, for people; `facts` also as JSON, for programs."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    block = json.dumps(dict(facts), indent=2, default=str)
    return (
        f"---\nlibrary_name: transformers\ntags: [rlkit, {name}]\n---\n\n"
        f"# Trained by rlkit `{name}`\n\n{paper}\n\n| | |\n|---|---|\n{rows}\n\n"
        f"## Configuration\n\n```yaml\n{config}```\n\n## Facts\n\n```json\n{block}\n```\n"
    )
