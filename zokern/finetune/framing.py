"""What a language model reads: a row's texts in a template, and the tokens of a text that goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zokern.finetune.examples import Text, parts
from zokern.finetune.fitting import Cut, fitted
from zokern.finetune.options import FinetuneError
from zokern.kinds import filled, placeholders


class Frame:
    """template: holds {names}, one for each text of a row, in their order. max_length: of what is read, in tokens.

    space: one space is between template and what goes on, whether written at the end of the one, at the beginning of the
    other, or not at all. Else nothing is, and both are taken as they are. cut: the place of the text that gives way where a
    row is too long; None: the longest ones. encoder: an encoder reads the prompt, and a decoder says what goes on. chat:
    the prompt is what the user says in the tokenizer's chat template, and the model's turn is next.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        max_length: int,
        *,
        space: bool = True,
        cut: int | None = None,
        encoder: bool = False,
        chat: bool = False,
    ) -> None:
        self.tokenizer, self.max_length, self.space, self.cut = tokenizer, max_length, space, cut
        self.encoder, self.chat = encoder, chat
        self.template = template.rstrip(" ") if space else template
        self.names = placeholders(template)
        if chat and not getattr(tokenizer, "chat_template", None):
            raise FinetuneError("--chat: the tokenizer of --model has no chat template; leave --chat out")

    def fill(self, row: Sequence[str]) -> str:
        """The template with the texts of a row. What stands in braces in a text stays."""
        text = filled(self.template, dict(zip(self.names, row, strict=True)))
        if not self.chat:
            return text
        turn = [{"role": "user", "content": text}]
        try:
            return str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program, and raises what it likes
            raise FinetuneError(
                f"--chat: the tokenizer's chat template does not take one turn of a user ({error})"
            ) from error

    def prompts(self, rows: Sequence[Text]) -> tuple[list[list[int]], Cut]:
        """The tokens of each row, at most max_length, and how many rows were cut for that."""
        found = self._encoded([self.fill(parts(row)) for row in rows])
        cut = Cut.of(list(map(len, found)), self.max_length)
        long = [i for i, ids in enumerate(found) if len(ids) > self.max_length]
        for i in long:
            found[i] = self._cut(parts(rows[i]))
        worst = max((len(found[i]) for i in long), default=0)
        if worst > self.max_length:
            raise FinetuneError(self._does_not_fit(worst))
        return found, cut

    def _cut(self, row: Sequence[str]) -> list[int]:
        """The tokens of a row with texts that have given way, as far as they can."""

        def count(texts: Sequence[str]) -> int:
            return len(self._encoded([self.fill(texts)])[0])

        return self._encoded([self.fill(fitted(row, self.tokenizer, count, self.max_length, self.cut))])[0]

    def _does_not_fit(self, worst: int) -> str:
        if self.cut is None or len(self.names) == 1:
            what = "--template alone has"
        else:
            what = f"--template with all columns but {self.names[self.cut]!r}, which --cut lets give way, has up to"
        return f"{what} {worst} tokens; --max-length is {self.max_length}: raise it"

    def going_on(self, texts: Sequence[str], what: Callable[[int], str]) -> list[list[int]]:
        """The tokens of each text where it follows the template.

        what: names the i-th in the error for one that does not begin a token of its own there.
        """
        if self.encoder:
            said: list[list[int]] = self.tokenizer(text_target=list(texts))["input_ids"]
            return [self._open(ids) for ids in said]
        base = self.fill(["x"] * len(self.names))
        before, *found = self._encoded([base, *(base + self._lead(text) for text in texts)])
        for i, ids in enumerate(found):
            if ids[: len(before)] != before or len(ids) == len(before):
                raise FinetuneError(
                    f"{what(i)} does not begin a token of its own after --template {self.template!r}; end the template "
                    "with a word or a colon, choose words the tokenizer knows, and leave --no-space to languages without "
                    "spaces"
                )
        return [ids[len(before) :] for ids in found]

    def _lead(self, text: str) -> str:
        if self.chat:
            return text.strip()
        return " " + text.strip() if self.space else text

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=not self.chat)["input_ids"]
        return found if self.encoder or self.chat else [self._open(ids) for ids in found]

    def _open(self, ids: list[int]) -> list[int]:
        """Without the end token: the text goes on."""
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids
