"""Loads causal LMs and tokenizers from the Hub, a folder, a GGUF file, a Python package or quark itself.

Only safetensors weights and GGUF files are read: nothing is unpickled, and no code of a model repository runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from quark.assets import asset_path
from quark.errors import ModelError
from quark.installing import install_command
from quark.models.activations import fuse_activations
from quark.models.config import ModelConfig
from quark.models.context import context_length
from quark.models.folders import (
    check_configuration,
    check_folder,
    check_repository,
    commit_of,
    offline,
)
from quark.models.gguf_header import check_gguf
from quark.models.lora import add_adapter
from quark.models.policy import PLAIN_TOKENIZER_FILE, Policy, not_beginning_with, pad_id
from quark.models.positions import give_reward_token_its_own_position
from quark.models.progress import without_progress_bars
from quark.models.recomputation import recompute_layers
from quark.models.reward_tokens import (
    REWARD_TOKENS_FILE,
    add_reward_tokens,
    begin_from_words,
    read_reward_tokens,
    without_tokens,
)
from quark.models.token_critic import TokenCritic
from quark.publication import publishing_directory
from quark.safe_files import contained


def weights_dtype(config: ModelConfig) -> torch.dtype:
    """The torch type that ``config.dtype`` names."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, without reward tokens.

    Raises:
        ModelError: it cannot be found, or has no fast form.
    """
    return _read_tokenizer(_locate(config))


def model_folder(config: ModelConfig) -> Path | None:
    """The folder with the model's files; None for a model on the Hub.

    Raises:
        ModelError: it cannot be found.
    """
    source = _locate(config)
    return Path(source.location) if source.is_local else None


def load_context_length(config: ModelConfig) -> int | None:
    """The most tokens that the model sees; None if it has no limit.

    Raises:
        ModelError: it cannot be found.
    """
    source = _locate(config)
    with _translated(source.name), _reach_of(source):
        check_configuration(source.location, revision=source.revision, is_local=source.is_local)
        return context_length(
            AutoConfig.from_pretrained(
                source.location,
                revision=source.revision or "main",
                trust_remote_code=False,
                local_files_only=source.is_local,
            )
        )


def vocab_size_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest token id. Added tokens may leave gaps below it."""
    highest: int = max(tokenizer.get_vocab().values())
    return highest + 1


def load_base_model(
    config: ModelConfig,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The original model in eval mode, without reward tokens.

    Args:
        config: which one.
        device: target device; None is the CPU.
        dtype: of the weights; None is ``config.dtype``.

    Raises:
        ModelError: it cannot be found, or has no safe weights.
    """
    return _read_model(_locate(config), device=device, dtype=dtype or weights_dtype(config))


def load_new_classifier(
    config: ModelConfig, labels: Sequence[str], *, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with a new, untrained head for ``labels`` in float32, and its tokenizer, which pads on the right.

    Args:
        config: the model; of a causal LM, the head reads the last token.
        labels: names of the labels, by index.
        seed: of the head.

    Raises:
        ModelError: it cannot be found, or transformers has no sequence classifier of its kind.
    """
    source = _locate(config)
    names = dict(enumerate(labels))
    with (
        _translated(source.name),
        without_progress_bars(),
        _reach_of(source),
        torch.random.fork_rng(devices=[]),
    ):
        check_configuration(source.location, revision=source.revision, is_local=source.is_local)
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            source.location,
            revision=source.revision or "main",
            adapter_kwargs=_adapter_of(source),
            id2label=names,
            label2id={name: index for index, name in names.items()},
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=source.is_local,
        )
    tokenizer = _read_tokenizer(source)
    tokenizer.padding_side = "right"
    return model, tokenizer


def load_policy(
    config: ModelConfig,
    *,
    num_quantiles: int,
    seed: int,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Policy:
    """A trainable copy of the original model with ``num_quantiles`` new reward tokens, in eval mode.

    Args:
        config: the original model.
        num_quantiles: K.
        seed: of the reward tokens' vectors, and of the adapters where there are any.
        device: target device; None is the CPU.
        dtype: of the weights; None is ``config.dtype``.

    Raises:
        ModelError: the model cannot be found, or cannot take reward tokens or adapters.
    """
    source = _locate(config)
    model = _read_model(source, device=device, dtype=dtype or weights_dtype(config))
    tokenizer = _read_tokenizer(source)
    check_padding(model, tokenizer)
    has_own_position = False
    if config.reward_tokens and config.shift_positions is not False:
        has_own_position = give_reward_token_its_own_position(model)
    if config.shift_positions and not has_own_position:
        raise ModelError(
            f"{config.name}: shift_positions needs a model with absolute positions, and "
            f"{type(model).__name__} has none. Leave it unset."
        )
    if config.reward_tokens:
        reward_tokens = add_reward_tokens(
            model, tokenizer, num_quantiles, seed=seed, std_scale=config.reward_token_std_scale
        )
    else:
        reward_tokens = without_tokens(model, tokenizer, num_quantiles)
    if config.lowest_words:
        begin_from_words(
            model, tokenizer, reward_tokens, (config.lowest_words, config.highest_words)
        )
    adapter = None
    if config.lora.rank:
        adapter = add_adapter(model, reward_tokens, config.lora, seed=seed)
    if config.gradient_checkpointing:
        recompute_layers(model)
    return Policy(
        model,
        tokenizer,
        reward_tokens,
        num_leading_positions=int(has_own_position),
        adapter=adapter,
    )


def load_saved_policy(
    folder: Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Policy:
    """The policy that ``Policy.save`` wrote, unchanged: its tokenizer adds no reward token by itself.

    Raises:
        ModelError: the folder is missing or was not written by ``Policy.save``.
        UnsafeFileError: a link leads out of it, or something in it is neither a file nor a folder.
    """
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}")
    check_folder(folder)
    reward_tokens, num_leading_positions = read_reward_tokens(folder)
    source = _Source(name=str(folder), location=str(folder), revision=None, is_local=True)
    tokenizer = _read_tokenizer(source)
    plain = folder / PLAIN_TOKENIZER_FILE
    if plain.is_file():
        with _translated(str(plain)):
            # Truncation and padding settings are the caller's; only what is added to a text differs.
            plain_backend = Tokenizer.from_file(str(plain))
            tokenizer.backend_tokenizer.post_processor = plain_backend.post_processor
    model = _read_model(source, device=device, dtype=dtype)
    num_rows = model.get_input_embeddings().weight.shape[0]
    if reward_tokens.are_placed:
        first = reward_tokens.texts[-1]
        tokenizer.chat_template = not_beginning_with(first, tokenizer.chat_template)
        if tuple(tokenizer.convert_tokens_to_ids(list(reward_tokens.texts))) != reward_tokens.ids:
            raise ModelError(
                f"{folder}: its tokenizer does not have the reward tokens it was saved with"
            )
        if max(reward_tokens.ids) >= num_rows or not 0 < reward_tokens.base_vocab_size <= num_rows:
            raise ModelError(f"{folder}: its model has no rows for its reward tokens")
        if reward_tokens.base_vocab_size > min(reward_tokens.ids):
            raise ModelError(
                f"{folder / REWARD_TOKENS_FILE}: its base_vocab_size includes reward tokens"
            )
    elif reward_tokens != without_tokens(model, tokenizer, reward_tokens.num_quantiles):
        raise ModelError(
            f"{folder / REWARD_TOKENS_FILE} is of another vocabulary than the model beside it"
        )
    return Policy(
        model,
        tokenizer,
        reward_tokens,
        num_leading_positions=num_leading_positions,
        critic=TokenCritic.read(folder, base_vocab_size=reward_tokens.base_vocab_size),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """The location of a model's files."""

    name: str
    """As the user gave it."""
    location: str
    """A folder, or a hub name."""
    revision: str | None
    """The commit; None for a folder."""
    is_local: bool


def _locate(config: ModelConfig) -> _Source:
    """Resolve a configured name to a folder or a hub name; converts a GGUF file on the way."""
    name = config.name
    scheme, _, rest = name.partition(":")
    path = Path(name).expanduser()
    folder: Path | None = None
    gguf_file = config.gguf_file
    if scheme == "embedded":
        try:
            folder = asset_path("models", rest)
        except FileNotFoundError as err:
            raise ModelError(str(err)) from err
    elif scheme == "package":
        folder = _package_folder(rest)
    elif path.is_file() and path.suffix == ".gguf":
        folder, gguf_file = path.parent, path.name
    elif path.is_dir():
        folder = path
    elif path.exists() or _looks_like_a_path(name):
        raise ModelError(
            f"there is no model at {path}: give a model folder, a .gguf file or a hub name"
        )

    if gguf_file is not None:
        file = _hub_file(config, gguf_file) if folder is None else _inside(folder, gguf_file)
        folder = _converted(file, config.cache_dir or _default_cache())
    if folder is None:
        with _translated(name):
            commit = commit_of(name, config.revision)
            check_repository(name, revision=commit)
        return _Source(name=name, location=name, revision=commit, is_local=False)
    _check_weights(folder, is_installed=scheme in ("embedded", "package"))
    return _Source(name=name, location=str(folder), revision=None, is_local=True)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or not name


def _package_folder(name: str) -> Path:
    package, *folders = name.split("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    locations = None if found is None else found.submodule_search_locations
    if not locations:
        raise ModelError(f"package:{name}: no Python package {package!r} is installed")
    folder = Path(next(iter(locations)), *folders)
    if not all(map(_is_plain_name, folders)) or not folder.is_dir():
        raise ModelError(f"package:{name}: the package has no folder {'/'.join(folders)!r}")
    return folder


def _inside(folder: Path, file_name: str) -> Path:
    path = folder / file_name
    if not _is_plain_name(file_name) or not path.is_file():
        raise ModelError(f"{folder} has no file {file_name}")
    return contained(path, folder)


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def _check_weights(folder: Path, *, is_installed: bool) -> None:
    """Refuse folders without safetensors weights, or with links out of them unless part of a package."""
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is not a model folder: it has no config.json. For a GGUF file, set gguf_file."
        )
    if not is_installed:  # installers may link to their own cache
        check_folder(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OSError,
            RecursionError,
        ) as err:
            raise ModelError(f"{index} cannot be read: {err!r}") from err
        for shard in sorted(shards, key=str):
            if not (isinstance(shard, str) and _is_plain_name(shard)) or not shard.endswith(
                ".safetensors"
            ):
                raise ModelError(f"{index} names {shard!r}, which is not a file of its own folder")
            if not (folder / shard).is_file():
                raise ModelError(f"{folder} lacks {shard}, which its index names")
    elif not (folder / "model.safetensors").is_file():
        if any(folder.glob("*.bin")):
            raise ModelError(
                f"{folder} has pickled weights only (.bin), which quark does not open. Convert them: "
                "load the model with transformers where you trust it, then save_pretrained."
            )
        raise ModelError(f"{folder} has no model.safetensors")


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "quark" / "models"


def _hub_file(config: ModelConfig, file_name: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _translated(f"{config.name} ({file_name})"):
        return Path(hf_hub_download(config.name, file_name, revision=config.revision))


def _dequantized() -> dict[str, object]:
    """The argument that asks transformers for plain weights."""
    from transformers import GgufConfig

    return {"quantization_config": GgufConfig(dequantize=True)}


def _converted(file: Path, cache: Path) -> Path:
    """The folder with the dequantized float32 model of a GGUF file, made on first use."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = cache / f"gguf-{digest[:32]}"
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"{file} is a GGUF file, and the package that reads it is not installed: {install_command('gguf')}"
        )
    check_gguf(file)
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with (
            publishing_directory(folder) as staged,
            _translated(str(file)),
            without_progress_bars(),
            offline(),
        ):
            model = AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                **_dequantized(),
                dtype=torch.float32,
                trust_remote_code=False,
                local_files_only=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                trust_remote_code=False,
                local_files_only=True,
            )
            model.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
    except FileExistsError:
        if not (folder / "config.json").is_file():  # another process was faster
            raise
    return folder


def _read_tokenizer(source: _Source) -> PreTrainedTokenizerBase:
    with _translated(source.name), without_progress_bars(), _reach_of(source):
        tokenizer = AutoTokenizer.from_pretrained(
            source.location,
            revision=source.revision or "main",
            trust_remote_code=False,
            local_files_only=source.is_local,
        )
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()):
        # Without files the library makes one of its class's special tokens alone.
        raise ModelError(_without_tokenizer(source.name))
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"{source.name}: its tokenizer ({type(tokenizer).__name__}) has no fast form, which quark needs"
        )
    tokenizer.padding_side = "left"
    return tokenizer


def _adapter_of(source: _Source) -> dict[str, str]:
    """Where transformers looks for an adapter: in the same commit, not on the branch as it is now."""
    return {"revision": source.revision or "main"}


def _read_model(
    source: _Source, *, device: torch.device | None, dtype: torch.dtype
) -> PreTrainedModel:
    with _translated(source.name), without_progress_bars(), _reach_of(source):
        check_configuration(source.location, revision=source.revision, is_local=source.is_local)
        model = AutoModelForCausalLM.from_pretrained(
            source.location,
            revision=source.revision or "main",
            adapter_kwargs=_adapter_of(source),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=source.is_local,
        )
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{source.name} is not a causal language model")
    fuse_activations(model)
    model.to(device or torch.device("cpu"))
    return model.eval()


def _reach_of(source: _Source) -> AbstractContextManager[None]:
    """The context for reading it: a local folder needs no network."""
    return offline() if source.is_local else nullcontext()


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Turn errors of the library and the Hub into a ``ModelError`` that names the model."""
    try:
        yield
    except ModelError:
        raise
    except Exception as err:
        raise ModelError(_explain(name, err)) from err


def check_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the model has a row for the padding token.

    Raises:
        ModelError: the token's id is beyond the model's vocabulary.
    """
    num_rows, filler = model.get_input_embeddings().weight.shape[0], pad_id(tokenizer)
    if not 0 <= filler < num_rows:
        raise ModelError(
            f"{model.name_or_path or 'the model'}: its tokenizer pads with token {filler}, and its vocabulary has "
            f"{num_rows} rows. Set pad_token in tokenizer_config.json to a token that the model knows, such as its "
            "eos_token"
        )


def _without_tokenizer(name: str) -> str:
    return (
        f"{name} has no tokenizer: put tokenizer.json and tokenizer_config.json of the model that it was made from "
        "beside its config.json"
    )


def _explain(name: str, err: Exception) -> str:
    text = str(err)
    if "instantiate the backend tokenizer" in text:
        return _without_tokenizer(name)
    if "Padding_idx" in text:
        return f"{name}: pad_token_id in its config.json is beyond its vocab_size: set it to null, or to a token that it has"
    kinds = {kind.__name__ for e in _chain(err) for kind in type(e).__mro__}
    if "GatedRepoError" in kinds:
        return (
            f"{name} is a gated model: accept its terms on the hub and log in with `hf auth login`"
        )
    if "RepositoryNotFoundError" in kinds or "is not a valid model identifier" in text:
        return f"there is no model {name} on the hub, and no folder of that name"
    if kinds & {
        "OfflineModeIsEnabled",
        "LocalEntryNotFoundError",
        "ConnectionError",
        "ConnectError",
    } or ("couldn't connect" in text):
        return (
            f"{name} is not on this machine and the hub cannot be reached. Check the network, download "
            "the model where there is one and give its folder, or use embedded:reviews"
        )
    if "trust_remote_code" in text:
        return f"{name} needs code of its own repository to load, which quark does not run"
    if "safetensors" in text and isinstance(err, OSError):
        return f"{name} has no safetensors weights, the only kind that quark opens"
    first = text.strip().splitlines()[0] if text.strip() else type(err).__name__
    return f"{name} cannot be loaded: {first}"


def _chain(err: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while err is not None and id(err) not in seen:
        seen.add(id(err))
        yield err
        err = err.__cause__ or err.__context__
