"""The checks of a model: each tries what a run will do, on made-up texts."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
)

from quark.models.additions import additions_of
from quark.models.batch import TrainingBatch, valid_positions
from quark.models.check.results import CheckFinding, ModelCheck, State
from quark.models.folders import offline
from quark.models.policy import Policy
from quark.models.progress import without_progress_bars
from quark.models.running import first_line

LARGEST_SAVED_BYTES = 1 << 30
"""Weights of a model that is saved and loaded to try it. For a larger one it would take too long."""
_TEXTS = ("The", "The cat sat on", "A b")
_NUM_NEW = 3
_HALF = (torch.float16, torch.bfloat16)
_LARGEST_ROUNDING = 0.25
"""Nats by which a half-precision model may differ once adapters are merged: its weights are rounded again."""


def check_policy(policy: Policy) -> ModelCheck:
    """Try everything that a run does with ``policy``, which stays as it is.

    Writes to a temporary folder, and nowhere else.
    """
    findings = [_padding(policy), _cache(policy), _reward_tokens(policy), _texts(policy)]
    num_bytes = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    if num_bytes > LARGEST_SAVED_BYTES:
        text = f"not tried: its weights have {num_bytes / 1e9:.1f} GB"
        return ModelCheck(
            findings=(*findings, CheckFinding(name="saved model", state="untried", detail=text))
        )
    with tempfile.TemporaryDirectory(prefix="quark-check-") as folder, _quiet(), _nudged(policy):
        findings += _saved_model(policy, Path(folder))
    return ModelCheck(findings=tuple(findings))


def _padding(policy: Policy) -> CheckFinding:
    running = policy.causal.running
    note = f"padding on the left changes log-probabilities by {running.padding_gap:.2g} nats"
    if running.masks_padding:
        return _found("padding", "passed", note)
    return _found("padding", "slower", running.notes[0])


def _cache(policy: Policy) -> CheckFinding:
    running = policy.causal.running
    slower = running.notes[0 if running.masks_padding else 1 :]
    if slower:
        return _found("cache", "slower", slower[0])
    return _found(
        "cache", "passed", f"a step differs from a plain pass by {running.cache_gap:.2g} nats"
    )


def _reward_tokens(policy: Policy) -> CheckFinding:
    if not policy.reward_tokens.are_placed:
        return _found("reward tokens", "passed", "none, as model.reward_tokens says")
    tokens, num_rows = policy.reward_tokens, policy.model.get_input_embeddings().weight.shape[0]
    owned = set(policy.tokenizer.get_vocab().values()) - set(tokens.ids)
    where = f"ids {tokens.ids[0]} to {tokens.ids[-1]}, {num_rows} rows, the tokenizer's own up to {max(owned)}"
    is_sound = (
        tokens.ids == tuple(range(tokens.ids[0], tokens.ids[-1] + 1))
        and not owned & set(tokens.ids)
        and tokens.ids[-1] < num_rows
        and 0 <= policy.pad_id < num_rows
    )
    return _found("reward tokens", "passed" if is_sound else "refused", where)


def _texts(policy: Policy) -> CheckFinding:
    tokenizer = policy.tokenizer
    added = additions_of(tokenizer)
    names = [repr(tokenizer.decode(list(ids))) for ids in (added.before, added.after) if ids]
    said = []
    if added.before:
        said.append(f"puts {names[0]} before a text")
    if added.after:
        said.append(f"puts {names[-1]} after a text, which quark leaves out")
    return _found("tokenizer", "passed", " and ".join(said) or "adds nothing to a text")


def _saved_model(policy: Policy, folder: Path) -> Iterator[CheckFinding]:
    name = "saved model" if policy.adapter is None else "saved model with adapters merged"
    try:
        policy.save(folder)
        with offline():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=policy.model.dtype, local_files_only=True, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        model.to(policy.device).eval()
    except Exception as err:
        yield _found(name, "refused", f"it cannot be saved and loaded: {first_line(err)}")
        return
    limit = policy.causal.running.limit
    if policy.adapter is not None and any(p.dtype in _HALF for p in policy.model.parameters()):
        limit = max(limit, _LARGEST_ROUNDING)
    rows = [_steered(policy, text) for text in _TEXTS]
    gap = max(_gap(policy, row, _logits(model, row)) for row in rows)
    yield _found(
        name,
        "passed" if gap <= limit else "refused",
        f"loaded by transformers, it differs by {gap:.2g} nats",
    )
    yield _steering(policy, tokenizer, rows)
    yield _generate(policy, model, tokenizer)


def _steering(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]]
) -> CheckFinding:
    """Whether the saved tokenizer begins texts, pairs, batches and conversations with the best token."""
    found = {
        "text": [tokenizer(text).input_ids for text in _TEXTS] == list(rows),
        "pair": tokenizer(_TEXTS[0], _TEXTS[1]).input_ids[: len(rows[0])] == rows[0],
        "batch": [
            [i for i, seen in zip(ids, mask, strict=True) if seen]
            for ids, mask in zip(*_padded(tokenizer), strict=True)
        ]
        == list(rows),
    }
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": "Hi"}]
        try:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(text, add_special_tokens=False).input_ids
            best = policy.reward_tokens.best
            found["chat template"] = (ids[0] == best) == policy.reward_tokens.are_placed
        except Exception as err:
            found[f"chat template ({first_line(err)})"] = False
    wrong = [kind for kind, is_right in found.items() if not is_right]
    if not policy.reward_tokens.are_placed:
        if wrong:
            return _found("steering", "refused", f"tokens are added to: {', '.join(wrong)}")
        return _found("steering", "passed", "no token to add: the critic steers")
    if wrong:
        return _found("steering", "refused", f"the best token is not first in: {', '.join(wrong)}")
    return _found("steering", "passed", f"the best token is first in: {', '.join(found)}")


def _padded(tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], list[list[int]]]:
    batch = tokenizer(list(_TEXTS), padding=True)
    return batch.input_ids, batch.attention_mask


def _generate(
    policy: Policy,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> CheckFinding:
    """Whether the saved model's own ``generate`` computes what training computes."""
    ways = (
        ("", True, True),
        ("plain generate() of the saved model is right for one prompt at a time only", False, True),
        ("plain generate() of the saved model needs use_cache=False", False, False),
    )
    gaps = []
    for note, in_batch, uses_cache in ways:
        batches = [list(_TEXTS)] if in_batch else [[text] for text in _TEXTS]
        try:
            gap = max(
                _generated_gap(policy, model, tokenizer, batch, uses_cache=uses_cache)
                for batch in batches
            )
        except Exception:
            gap = float("inf")
        gaps.append(gap)
        if gap <= policy.causal.running.limit:
            detail = (
                f"{note}: otherwise it differs by {gaps[0]:.2g} nats"
                if note
                else (f"in a batch, it differs by {gap:.2g} nats")
            )
            return _found("generate()", "slower" if note else "passed", detail)
    return _found(
        "generate()",
        "untried",
        f"plain generate() of the saved model differs by {gaps[-1]:.2g} nats",
    )


def _generated_gap(
    policy: Policy,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    uses_cache: bool,
) -> float:
    inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    inputs = inputs.to(policy.device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=_NUM_NEW,
        use_cache=uses_cache,
        pad_token_id=policy.pad_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    out = model.generate(**inputs, generation_config=config)
    gaps = []
    width = inputs.input_ids.shape[1]
    for row, mask in enumerate(inputs.attention_mask):
        begin = width - int(mask.sum())
        ids = out.sequences[row, begin:].tolist()
        found = torch.stack([logits[row] for logits in out.logits])
        num_prompt = width - begin
        gaps.append(_gap(policy, ids[: num_prompt + len(found) - 1], found, first=num_prompt - 1))
    return max(gaps)


def _logits(model: PreTrainedModel, row: list[int]) -> Tensor:
    with torch.no_grad():
        ids = torch.tensor([row], device=model.device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


def _gap(policy: Policy, ids: list[int], found: Tensor, *, first: int = 0) -> float:
    """The largest difference of log-probabilities over the base vocabulary from the policy's own, from ``first`` on."""
    width = policy.reward_tokens.base_vocab_size
    with torch.no_grad():
        tensor = torch.tensor([ids], device=policy.device)
        expected = policy.causal.logits(
            tensor, torch.ones_like(tensor), is_conditioned=policy.reward_tokens.are_placed
        )
    expected = expected[0, first:, :width].float().log_softmax(-1)
    gap = float((found[:, :width].float().log_softmax(-1) - expected).abs().max())
    return gap if gap == gap else float("inf")


def _steered(policy: Policy, text: str) -> list[int]:
    """The ids of a text under the best token, if there is one."""
    first = [policy.reward_tokens.best] if policy.reward_tokens.are_placed else []
    ids = policy.tokenizer(text, add_special_tokens=False).input_ids
    return [*first, *additions_of(policy.tokenizer).before, *ids]


@contextmanager
def _nudged(policy: Policy) -> Iterator[None]:
    """Within: the adapters, if there are any, have made one step. They start without influence."""
    if policy.adapter is None:
        yield
        return
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    prompts = torch.tensor([[1, 2, 3]] * 2, device=policy.device)
    completions = torch.tensor([[4, 5]] * 2, device=policy.device)
    lengths = torch.tensor([2, 2], device=policy.device)
    rows = policy.completion_rows(
        TrainingBatch(
            reward_tokens=torch.tensor(policy.reward_tokens.ids[:2], device=policy.device),
            prompt_tokens=prompts,
            prompt_lengths=lengths + 1,
            completion_tokens=completions,
            completion_lengths=lengths,
            token_index=valid_positions(lengths, 2),
        )
    )
    try:
        loss = rows.head(rows.rows).float().square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad.sign()
                parameter.grad = None
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Within: transformers prints nothing."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_progress_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _found(name: str, state: State, detail: str) -> CheckFinding:
    return CheckFinding(name=name, state=state, detail=detail)
