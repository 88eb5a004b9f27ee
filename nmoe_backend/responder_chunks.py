"""One stream's tokens -> chunks: detokenise, look for stop strings, count. Belongs to one thread at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nmoe_backend.contract import ParsedRequest
from nmoe_backend.contract_outputs import Chunk
from nmoe_backend.text import IncrementalDetokenizer, StopChecker, Text
from nmoe_backend.types import FinishReason, TokenLogprobs

Token = tuple[int, TokenLogprobs | None, FinishReason | None]  # as TokenSink.put gets them


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What a stream has accumulated: everything that the engine said before `end`, when there is one."""

    tokens: Sequence[Token]
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    embedding: Sequence[float] = ()
    end: FinishReason | None = None  # closed without a further token


class ChunkBuilder:
    """Builds the chunks of one stream.

    A token id that ends the sequence (EOS, a stop id) is counted and listed but has no text, as in vLLM. Stop strings
    are looked for behind the first min_tokens tokens. A chunk whose text is still held back (half a character, maybe
    the beginning of a stop string) is built all the same: ids and counts are not held back.
    """

    def __init__(self, parsed: ParsedRequest, text: Text) -> None:
        sampling = parsed.request.sampling
        self._num_input_tokens = len(parsed.request.prompt_ids)
        self._stream = parsed.response.stream
        self._min_tokens = sampling.min_tokens
        self._stop = StopChecker(sampling.stop) if sampling.stop else None
        self._detokenizer = (
            IncrementalDetokenizer(text) if self._stop or "text_output" in parsed.response.outputs else None
        )
        self._echo = parsed.response.echo
        self._num_tokens = 0
        self._cum_logprob = 0.0
        self._prompt_logprobs: Sequence[TokenLogprobs] | None = None
        # what waits for the next chunk; without `stream` that is everything
        self._text: list[str] = [self._echo] if self._echo else []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def build(self, taken: Taken) -> Chunk | None:
        """The next chunk; its finish_reason says whether it is the last. None while there is nothing to send yet."""
        finish = self._add(taken)
        if finish is None and not (self._stream and self._ids):
            return None
        chunk = Chunk(
            text="".join(self._text),
            token_ids=self._ids,
            num_input_tokens=self._num_input_tokens,
            logprobs=self._logprobs,
            cum_logprob=self._cum_logprob,
            prompt_logprobs=self._prompt_logprobs,
            embedding=taken.embedding,
            finish_reason=finish,
        )
        self._text, self._ids, self._logprobs, self._prompt_logprobs = [], [], [], None
        return chunk

    def _add(self, taken: Taken) -> FinishReason | None:
        """Take everything over; the reason when this is the end."""
        if taken.prompt_logprobs is not None:
            self._prompt_logprobs = taken.prompt_logprobs
        tokens = taken.tokens
        finish = tokens[-1][2] if tokens else None
        finish = finish or taken.end
        ids = [token[0] for token in tokens]
        ends_by_id = bool(tokens) and tokens[-1][2] == "stop"
        kept = self._render(ids[:-1] if ends_by_id else ids, last=finish is not None)
        if kept is not None:
            finish, tokens, ids = "stop", tokens[:kept], ids[:kept]
        self._ids += ids
        self._num_tokens += len(ids)
        if tokens and tokens[0][1] is not None:
            logprobs = [token[1] for token in tokens if token[1] is not None]
            self._logprobs += logprobs
            self._cum_logprob += sum(entry.logprob for entry in logprobs)
        return finish

    def _render(self, ids: list[int], last: bool) -> int | None:
        """Append the text of `ids`. How many of them are kept where a stop string was found, else None."""
        detokenizer = self._detokenizer
        if detokenizer is None:
            return None
        free = max(0, self._min_tokens - self._num_tokens) if self._stop else len(ids)
        delta = detokenizer.feed(ids[:free])
        if self._stop is None:
            self._append(delta + detokenizer.flush() if last else delta)
            return None
        self._append(delta)
        checked = ids[free:]
        before, held = detokenizer.state(), self._stop.held
        delta = detokenizer.feed(checked)
        text, found = self._stop.feed(delta + detokenizer.flush() if last else delta)
        self._append(text)
        if found:
            detokenizer.restore(before)
            return free + self._tokens_until_stop(detokenizer, held, checked)
        if last:
            self._append(self._stop.flush())
        return None

    def _tokens_until_stop(self, detokenizer: IncrementalDetokenizer, held: str, ids: list[int]) -> int:
        """The same tokens once more, one by one: which of them completed the stop string."""
        assert self._stop is not None
        probe = self._stop.fresh(held)
        for count, token_id in enumerate(ids, start=1):
            if probe.feed(detokenizer.feed([token_id]))[1]:
                return count
        return len(ids)  # completed by the U+FFFD of the flush

    def _append(self, text: str) -> None:
        if text:
            self._text.append(text)
