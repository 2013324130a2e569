"""Sampling decoder: each distinct prompt prefix is computed once, and a finished reply's slot is refilled at once.

It knows ids, not text. Notation: R rows being decoded (slots 0..R-1 of the cache), D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from selfevo.generate.adapters import decoding_layers
from selfevo.generate.cache import Prefill, Prompt, RowCache, SlotCache
from selfevo.generate.form import Filling, Form
from selfevo.generate.graphs import step_graphs
from selfevo.generate.sampling import Sampling, ban, remember
from selfevo.generate.shared_cache import SharedPrefixCache
from selfevo.kernels.head import allocate_logits, head_logits
from selfevo.models.transformer import Transformer
from selfevo.trie.packing import pack
from selfevo.trie.trie import Ids, as_ids, build_trie, private_tails

MAX_PREFILL_TOKENS = 4096  # distinct prompt tokens of one prefill pass
SLOTS = 32  # replies decoded at a time
_TAIL = 1.5  # the longest tail over the median one

Phase = Literal["prefill", "fixed", "decode", "logits", "sample"]
# Called as observer(phase, rows, waiting); the context it returns spans the phase. ``rows`` are the replies (in prefill
# the distinct prompt tokens) that the phase computes, ``waiting`` the prompts without a slot. "fixed" is a form's text.
Observer = Callable[[Phase, int, int], AbstractContextManager[object]]


def _unobserved(phase: Phase, rows: int, waiting: int) -> AbstractContextManager[object]:
    return nullcontext()


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
    temperature: float = Sampling.temperature,
    top_p: float = Sampling.top_p,
    top_k: int = Sampling.top_k,
    repetition_penalty: float = Sampling.repetition_penalty,
    seed: int = Sampling.seed,
    keys: Sequence[int] | None = None,
    batch_size: int = SLOTS,
    stop_when: Callable[[list[int]], bool] | None = None,
    form: Form | None = None,
    on_reply: Callable[[int, list[int]], None] | None = None,
    progress: str | None = None,
    cuda_graphs: bool = False,
    observer: Observer = _unobserved,
) -> list[list[int]]:
    """Samples one reply per prompt: new ids only, the stop id not included, in the order of the prompts.

    ``temperature`` 0 is greedy. A reply depends on the seed, its own prompt and its key (by default its index), not on
    the prompts that share its batch. ``stop_when`` sees the ids of a reply after every token and may end it, that token
    included. A ``form`` has its fixed ids written, several in one pass, and its slots filled, where ids that it bans
    have probability 0; the reply holds all of it, and nothing else ends it. At most ``batch_size`` replies are decoded
    at a time; ``on_reply`` gets the index and the ids of each as soon as it is finished, in any order. ``progress``
    names a progress bar. ``cuda_graphs`` captures decode steps on a CUDA device (not yet tried on a GPU). ``observer``
    is called around every phase, for benchmarks. Adapters are applied without dropout; the model is left as it was.
    Raises ValueError for settings out of range, an empty prompt, ids outside the vocabulary, a prompt that leaves no
    room for ``max_new_tokens``, or a form that may need more of them.
    """
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed)
    if keys is None:
        keys = range(len(prompts))
    ending = _Ending(max_new_tokens, frozenset(map(int, stop_ids)), stop_when)
    _check(model, prompts, keys, max_new_tokens, batch_size)
    if form is not None and form.longest > max_new_tokens:
        raise ValueError(f"the form takes up to {form.longest} tokens, max_new_tokens allows {max_new_tokens}")
    if not prompts:
        return []
    sequences = [_Sequence.of(index, key, prompt, form) for index, (key, prompt) in enumerate(zip(keys, prompts))]
    was_training = model.training
    model.eval()
    try:
        bar = tqdm(total=len(prompts), desc=progress, unit="reply", disable=progress is None)
        # What FSDP2 gathers in inference mode could not be gathered again in training.
        without_gradients = torch.no_grad() if model.shared else torch.inference_mode()
        with bar, without_gradients, decoding_layers(model):
            decoder = _Decoder(model, sampling, sequences, ending, batch_size, on_reply, cuda_graphs, observer)
            while decoder.step():
                bar.update(decoder.finished - bar.n)
                bar.set_postfix_str(f"{decoder.produced} tokens", refresh=False)
            bar.update(decoder.finished - bar.n)
    finally:
        model.train(was_training)
    return [sequence.reply for sequence in sequences]


@dataclass(frozen=True)
class _Ending:
    """What ends a reply without a form."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    stop_when: Callable[[list[int]], bool] | None


@dataclass
class _Sequence:
    """One prompt on its way to a reply. With a form the prompt holds the fixed ids that the reply begins with, and
    ``pending`` are those whose keys and values the cache lacks, but for the newest id."""

    index: int
    key: int
    prompt: Ids
    reply: list[int]
    filling: Filling | None
    distinct: int = 0  # ids of the prompt
    tail: int = 0  # of its last ids, which a cache that shares prefixes keeps with the reply
    pending: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, index: int, key: int, prompt: Sequence[int], form: Form | None) -> _Sequence:
        if form is None:
            return cls(index, key, as_ids(prompt), [], None)
        start = form.fixed[0]
        return cls(index, key, np.concatenate((as_ids(prompt), as_ids(start))), list(start), Filling(form))


class _Decoder:
    """Slots, what each of them holds, and the queue of prompts that wait for one."""

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling,
        sequences: list[_Sequence],
        ending: _Ending,
        batch_size: int,
        on_reply: Callable[[int, list[int]], None] | None,
        cuda_graphs: bool,
        observer: Observer,
    ) -> None:
        self.model, self.sampling, self.observer = model, sampling, observer
        self.ending, self.on_reply = ending, on_reply
        slots, device = min(batch_size, len(sequences)), model.device
        longest, new = max(len(sequence.prompt) for sequence in sequences), ending.max_new_tokens
        padding = 0 if sequences[0].filling is None else sequences[0].filling.form.longest_run
        packs = pack([[sequence.prompt] for sequence in sequences], MAX_PREFILL_TOKENS)
        self.packs = deque([sequences[index] for index in members] for members in packs)
        set_tails(self.packs)
        self.cache = row_cache(model, slots, longest, new + padding, max(sequence.tail for sequence in sequences))
        self.graphs = step_graphs(device) if cuda_graphs else None
        self.logits = allocate_logits(slots, model.lm_head.weight)
        # What the sampler needs of every slot: the distinct ids seen, how many they are, the keys and counters of the
        # random draws, and the newest token.
        self.seen = torch.zeros(slots, longest + new, dtype=torch.int64, device=device)
        self.seen_lengths, self.keys, self.steps, self.last = (
            torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.ready: deque[tuple[_Sequence, Prompt, Tensor]] = deque()  # prefilled, each with its last hidden state
        self.running: list[_Sequence] = []
        self.finished = self.produced = 0

    def step(self) -> bool:
        """One token for every running reply, and one for those that enter; False once all are finished."""
        if self.running:
            self.write_fixed_ids()
            hidden = self.decode_one_token()
            self.sample(slice(0, len(self.running)), hidden)
            self.retire_finished()
        while self.enter_waiting():  # again, as a reply may be finished by its first token
            self.retire_finished()
        return bool(self.running)

    def write_fixed_ids(self) -> None:
        """One pass over the fixed ids of all rows that came to some, but for the last of them, which the next step
        feeds as it feeds any row's newest id."""
        rows = [row for row, sequence in enumerate(self.running) if sequence.pending]
        if not rows:
            return
        pending = [torch.tensor(self.running[row].pending) for row in rows]
        counts = [len(ids) for ids in pending]
        with self._observed("fixed", sum(counts)):
            self.cache.extend(rows, counts)
            tokens = pad_sequence(pending, batch_first=True).to(self.model.device)
            self.model.hidden_states(tokens, self.cache.step(), self.cache)
        for row in rows:
            self.running[row].pending = []

    def decode_one_token(self) -> Tensor:
        """Feeds each row's last token to the model: hidden states (R, D)."""
        self.cache.advance(len(self.running))
        with self._observed("decode", len(self.running)):
            if self.graphs is None:
                hidden = self._forward()
            else:
                hidden = self.graphs.run((self.cache.rows, self.cache.span), self._forward)
        return hidden[: len(self.running)]

    def _forward(self) -> Tensor:
        """The part of a step that depends on nothing but its shape and what the buffers hold: (rows, D)."""
        positions, last = self.cache.step(), self.last[: self.cache.rows, None]
        return self.model.hidden_states(last, positions, self.cache)[:, 0]

    def sample(self, rows: slice, hidden: Tensor) -> None:
        """Samples the next token of some rows from their hidden states (R, D), and appends it to their replies."""
        sequences = self.running[rows]
        seen = self.seen[rows, : max(sequence.distinct + len(sequence.reply) for sequence in sequences)]
        with self._observed("logits", len(sequences)):
            logits = head_logits(hidden, self.model.lm_head.weight, self.logits)
        with self._observed("sample", len(sequences)):
            ban(logits, [None if s.filling is None else s.filling.banned for s in sequences])
            tokens, found = self.sampling.sample(logits, seen, self.keys[rows], self.steps[rows])
            for place, (sequence, token) in enumerate(zip(sequences, found)):
                if sequence.filling is None:
                    sequence.reply.append(token)
                else:
                    tokens[place] = self.fill(sequence, sequence.filling.take(token), rows.start + place)
            self.last[rows] = tokens
            self.steps[rows] += 1
            self.remember(rows, tokens)
        self.produced += len(sequences)

    def fill(self, sequence: _Sequence, ids: list[int], row: int) -> int:
        """Appends what a sampled id made of a form to the reply in ``row``, all but the last id to be computed later:
        that one."""
        sequence.reply += ids
        *sequence.pending, newest = ids
        for token in sequence.pending:
            self.remember(slice(row, row + 1), self.last.new_tensor([token]))
        return newest

    def remember(self, rows: slice, tokens: Tensor) -> None:
        remember(self.seen[rows], self.seen_lengths[rows], tokens)
        self.seen_lengths[rows] += 1

    def retire_finished(self) -> None:
        """Takes finished replies out; the last row moves into the gap, so active rows stay the first ones."""
        for row in reversed(range(len(self.running))):
            sequence = self.running[row]
            if not self._is_finished(sequence):
                continue
            self.finished += 1
            if self.on_reply is not None:
                self.on_reply(sequence.index, sequence.reply)
            final = len(self.running) - 1
            if row != final:
                self.cache.move(final, row)
                for state in (self.seen, self.seen_lengths, self.keys, self.steps, self.last):
                    state[row] = state[final]
                self.running[row] = self.running[final]
            self.running.pop()

    def _is_finished(self, sequence: _Sequence) -> bool:
        """Whether a reply ends with its newest token, which a stop id takes with it."""
        if sequence.filling is not None:
            return sequence.filling.finished
        ending, reply = self.ending, sequence.reply
        if reply[-1] in ending.stop_ids:
            reply.pop()
            return True
        return len(reply) == ending.max_new_tokens or (ending.stop_when is not None and ending.stop_when(reply))

    def enter_waiting(self) -> bool:
        """Fills free slots with prefilled prompts and samples the first token of each; False if nothing entered."""
        first = len(self.running)
        states = []
        while len(self.running) < len(self.keys) and (self.ready or self.prefill()):
            sequence, prompt, hidden = self.ready.popleft()
            slot, distinct = len(self.running), torch.from_numpy(np.unique(sequence.prompt))
            sequence.distinct = len(distinct)
            self.cache.enter(slot, prompt)
            self.seen[slot] = int(distinct[0])
            self.seen[slot, : len(distinct)] = distinct
            self.keys[slot], self.seen_lengths[slot], self.steps[slot] = sequence.key, len(distinct), 0
            self.running.append(sequence)
            states.append(hidden)
        if states:
            self.sample(slice(first, len(self.running)), torch.stack(states))
        return bool(states)

    def prefill(self) -> bool:
        """Computes the distinct prefixes of the next pack of prompts; False if none is left."""
        if not self.packs:
            return False
        members = self.packs.popleft()
        trie = build_trie([sequence.prompt for sequence in members])
        device = self.model.device
        with self._observed("prefill", len(trie)):
            context = Prefill(trie, device)
            tokens, positions = trie.tokens.to(device)[None], trie.positions.to(device)[None]
            hidden = self.model.hidden_states(tokens, positions, context)[0]
            last = hidden[torch.tensor([path[-1] for path in trie.paths], device=device)]
            prompts = self.cache.prompts(context, [sequence.tail for sequence in members])
            self.ready += zip(members, prompts, last)
        return True

    def _observed(self, phase: Phase, rows: int) -> AbstractContextManager[object]:
        return self.observer(phase, rows, len(self.ready) + sum(map(len, self.packs)))


def set_tails(packs: Iterable[Sequence[_Sequence]]) -> None:
    """Sets the tails of all sequences to what they do not share with others of their pack, so that what is left of them
    can be one prefix for many. As every row's own keys are padded to the longest, a tail much longer than half of the
    others are stays with its prefix."""
    packs = list(packs)
    found = [private_tails([sequence.prompt for sequence in members]) for members in packs]
    limit = _TAIL * float(np.median(np.concatenate(found)))
    for members, tails in zip(packs, found):
        for sequence, tail in zip(members, tails):
            sequence.tail = min(tail, len(sequence.prompt) - 1) if tail <= limit else 0


def row_cache(model: Transformer, slots: int, longest: int, new: int, tail: int = 0) -> RowCache:
    """The cache for this device, for prompts of up to ``longest`` tokens and replies of up to ``new``."""
    if model.device.type == "cpu" and slots > 1:
        return SharedPrefixCache(model, slots, tail + new)
    return SlotCache(model, slots, longest + new)


def _check(
    model: Transformer, prompts: Sequence[Sequence[int]], keys: Sequence[int], max_new_tokens: int, batch_size: int
) -> None:
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) and batch_size ({batch_size}) must be at least 1")
    if len(keys) != len(prompts):
        raise ValueError(f"there are {len(prompts)} prompts but {len(keys)} keys")
    for index, prompt in enumerate(prompts):
        if np.ndim(prompt) != 1:
            raise ValueError(f"prompt {index} should be a list of token ids, not {prompt!r:.60}")
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} has no tokens")
        if min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
            raise ValueError(f"prompt {index}: token ids should lie in 0..{model.config.vocab_size - 1}")
        if len(prompt) + max_new_tokens > model.config.max_positions:
            raise ValueError(
                f"prompt {index}: {len(prompt)} tokens and {max_new_tokens} new ones do not fit into the model's "
                f"window of {model.config.max_positions}"
            )
