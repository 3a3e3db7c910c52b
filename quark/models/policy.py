"""The policy: a causal LM with reward tokens, and the folder it is saved to."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeAlias

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from quark.errors import ModelError
from quark.models.additions import additions_of
from quark.models.batch import TrainingBatch
from quark.models.causal import CausalModel, CompletionRows
from quark.models.lora import Adapter
from quark.models.progress import without_progress_bars
from quark.models.reward_tokens import RewardTokens, write_reward_tokens
from quark.models.token_critic import CRITIC_FILE, STEERING_EXAMPLE, CriticSlot, TokenCritic

PLAIN_TOKENIZER_FILE = "quark_tokenizer.json"
"""File in a saved policy: its tokenizer without the best reward token before every text."""


class Policy:
    """The model that is trained.

    Its tokenizer adds no reward token by itself: conditioning is done by ids. A *saved* policy's
    tokenizer does, see ``save``.

    Args:
        model: with rows for the reward tokens.
        tokenizer: with the reward tokens.
        reward_tokens: their ids.
        num_leading_positions: 1 where the reward token has a position of its own
            (``give_reward_token_its_own_position``), else 0.
        adapter: what is trained, where that is not the model's own weights.
        critic: what a pool said of the vocabulary, where that is known.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reward_tokens: RewardTokens,
        *,
        num_leading_positions: int = 0,
        adapter: Adapter | None = None,
        critic: TokenCritic | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.reward_tokens = reward_tokens
        self.num_leading_positions = num_leading_positions
        self.adapter = adapter
        self.critics = CriticSlot(critic)
        self.causal = CausalModel(model, num_leading_positions=num_leading_positions)

    @property
    def device(self) -> torch.device:
        """The device that the model's weights are on."""
        device: torch.device = self.model.device
        return device

    @property
    def pad_id(self) -> int:
        """The id that fills padding. Masks come from lengths, so it may equal a real token's id."""
        return pad_id(self.tokenizer)

    @property
    def is_frozen(self) -> bool:
        """Whether the policy is the original model: it has no tokens of its own, and nothing trains its weights."""
        is_trained = any(parameter.requires_grad for parameter in self.model.parameters())
        return not (self.reward_tokens.are_placed or is_trained)

    @property
    def reward_matrix(self) -> tuple[nn.Parameter, slice]:
        """The parameter that holds the reward tokens' input vectors that are trained, and their rows in it.

        Raises:
            ModelError: the model has no reward tokens.
        """
        if not self.reward_tokens.are_placed:
            raise ModelError("model.reward_tokens is off: there are no vectors of reward tokens")
        if self.adapter is not None and self.adapter.embedding is not None:
            return self.adapter.embedding.rows, slice(None)
        ids = self.reward_tokens.ids
        weight: nn.Parameter = self.model.get_input_embeddings().weight
        return weight, slice(ids[0], ids[-1] + 1)

    @property
    def reward_vectors(self) -> Tensor:
        """[K, D] the reward tokens' input vectors that are trained: a view without gradient."""
        matrix, rows = self.reward_matrix
        return matrix.detach()[rows]

    def dropping(self, seed: int) -> AbstractContextManager[None]:
        """The context for a training step: adapters may drop inputs, chosen by ``seed``."""
        return nullcontext() if self.adapter is None else self.adapter.dropping(seed)

    def completion_rows(self, batch: TrainingBatch) -> CompletionRows:
        """The rows that predict the completions, each sequence under its reward token if there are any; differentiable."""
        has_token = self.reward_tokens.are_placed
        return self.causal.run(batch.policy_inputs() if has_token else batch.reference_inputs())

    def save(
        self, folder: Path, *, best_first: bool = True, max_new_tokens: int | None = None
    ) -> None:
        """Write a folder that plain transformers loads and that answers under the best reward token.

        Adapters are merged into the weights that are written; the policy itself stays as it is.

        Args:
            folder: created if missing.
            best_first: let the saved tokenizer put the best reward token before every text, so that an
                ordinary text-generation pipeline is steered. Without reward tokens, nothing is put there.
            max_new_tokens: default completion length of the saved model; None keeps the library's.

        Raises:
            OSError: the disk refused.
        """
        best_first = best_first and self.reward_tokens.are_placed
        folder.mkdir(parents=True, exist_ok=True)
        previous = self.model.generation_config
        self.model.generation_config = self._generation_config(max_new_tokens)
        merged = nullcontext() if self.adapter is None else self.adapter.merged()
        try:
            with without_progress_bars(), merged:
                self.model.save_pretrained(folder)
        finally:
            self.model.generation_config = previous
        self._save_tokenizer(folder, best_first=best_first)
        write_reward_tokens(
            folder, self.reward_tokens, num_leading_positions=self.num_leading_positions
        )
        if self.critics.critic is not None:
            self.critics.critic.save(folder)
        (folder / "README.md").write_text(self._card(best_first=best_first), encoding="utf-8")

    def _generation_config(self, max_new_tokens: int | None) -> GenerationConfig:
        num_columns = self.model.get_input_embeddings().weight.shape[0]
        return GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=stop_ids(self.model, self.tokenizer) or None,
            pad_token_id=self.pad_id,
            suppress_tokens=list(range(self.reward_tokens.base_vocab_size, num_columns)),
            **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}),
        )

    def _save_tokenizer(self, folder: Path, *, best_first: bool) -> None:
        template = self.tokenizer.chat_template
        try:
            if best_first:
                self.tokenizer.chat_template = beginning_with(
                    self.reward_tokens.texts[-1], template
                )
            self.tokenizer.save_pretrained(folder)
        finally:
            self.tokenizer.chat_template = template
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        # Batches of prompts are padded where a causal model needs it, with a token that it knows.
        config["padding_side"] = "left"
        if self.tokenizer.pad_token is None:
            config["pad_token"] = self.tokenizer.convert_ids_to_tokens(self.pad_id)
        if best_first:
            self._prepend_best(folder)
            # The library would replace the post-processor where these keys ask for one, or where a
            # model-specific class rebuilds the tokenizer; the beginning-of-sequence token is in the file.
            for key in ("add_bos_token", "add_eos_token"):
                config.pop(key, None)
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _prepend_best(self, folder: Path) -> None:
        """Give the saved tokenizer a post-processor that puts the best token before every text.

        It also puts there what the tokenizer adds by itself, except at the end of a text: an end-of-sequence token
        would end the prompt.
        """
        path = folder / "tokenizer.json"
        backend = Tokenizer.from_file(str(path))
        backend.save(str(folder / PLAIN_TOKENIZER_FILE))
        added = additions_of(self.tokenizer)
        names = {
            token_id: self.tokenizer.convert_ids_to_tokens(token_id)
            for token_id in (*added.before, *added.between)
        }
        best, best_id = self.reward_tokens.texts[-1], self.reward_tokens.best
        before = [f"{best}:0", *(f"{names[i]}:0" for i in added.before), "$A:0"]
        pair = [*before, *(f"{names[i]}:1" for i in added.between), "$B:1"]
        first = processors.TemplateProcessing(
            single=before,
            pair=pair,
            special_tokens=[(best, best_id), *((name, i) for i, name in names.items())],
        )
        backend.post_processor = first
        backend.save(str(path))

    def _card(self, *, best_first: bool) -> str:
        if not self.reward_tokens.are_placed:
            return _CARD_WITHOUT_TOKENS
        texts = self.reward_tokens.texts
        # What the tokenizer itself puts before a text (a beginning-of-sequence token) comes second.
        own = self.tokenizer.decode(list(additions_of(self.tokenizer).before))
        chat = (
            'Its chat template does the same for conversations, `generate([{"role": "user", ...}])`.\n\n'
            if self.tokenizer.chat_template
            else ""
        )
        steered = (
            f"The tokenizer puts `{texts[-1]}` before every text, so an ordinary pipeline gives text of the\n"
            "best quantile:\n\n"
            "```python\n"
            "from transformers import pipeline\n\n"
            'generate = pipeline("text-generation", model="path/to/this/folder")\n'
            'print(generate("The"))\n'
            "```\n\n"
            f"{chat}"
            "For another quantile, begin the prompt with its token and switch the tokenizer's own off:\n\n"
            if best_first
            else "The tokenizer does not put one there by itself:\n\n"
        )
        return (
            "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [quark]\n---\n\n"
            "# A model trained with quark\n\n"
            "Quantized Reward Konditioning (Lu et al., NeurIPS 2022). The first token says how good the text\n"
            f"shall be: `{texts[0]}` is the lowest of {len(texts)} reward quantiles, `{texts[-1]}` the best.\n"
            "Every text needs one of them first. They are never sampled (`suppress_tokens` in\n"
            "`generation_config.json`) and vanish with `skip_special_tokens=True`; their ids are in\n"
            "`quark_reward_tokens.json`.\n\n"
            f"{steered}"
            "```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
            f'inputs = tokenizer("{texts[0]}{own}The", add_special_tokens=False, return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))\n"
            "```\n"
        )


_CARD_WITHOUT_TOKENS = f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [quark]
---

# A model trained with quark

This model has no reward tokens: its vocabulary is the original model's. `{CRITIC_FILE}` scores every entry
of it by the reward that its texts got. Added to the logits, the scores steer the model: `g` times them for the best
quantile, `-g` times them for the lowest. `quark generate` does that by itself.

```python
{STEERING_EXAMPLE}
```
"""

ChatTemplate: TypeAlias = str | dict[str, str] | None
"""One template, several by name, or none."""


def beginning_with(text: str, template: ChatTemplate) -> ChatTemplate:
    """A chat template whose conversations begin with ``text``, a special token."""
    if isinstance(template, dict):
        return {name: text + one for name, one in template.items()}
    return None if template is None else text + template


def not_beginning_with(text: str, template: ChatTemplate) -> ChatTemplate:
    """The template that ``beginning_with`` was given."""
    if isinstance(template, dict):
        return {name: one.removeprefix(text) for name, one in template.items()}
    return None if template is None else template.removeprefix(text)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad id, or its end-of-sequence id, or 0: used only as a filler."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: the tokenizer's and the model's end-of-sequence ids, sorted."""
    ids: set[int] = set()
    for source in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
        if isinstance(source, int):
            ids.add(source)
        elif source is not None:
            ids.update(int(i) for i in source)
    return sorted(ids)
