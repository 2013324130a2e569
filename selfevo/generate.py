"""Sampling decoder: each distinct prompt prefix is prefilled once, and a finished reply's slot is refilled at once.

It knows ids, not text. Notation: R active rows (slots 0..R-1 of the cache), K key-value heads, E head size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from selfevo.caches import PrefillCache, Prompt, row_cache
from selfevo.folding import ready_layers
from selfevo.graphs import step_graphs
from selfevo.models.transformer import Transformer
from selfevo.products import head_logits, logits_room
from selfevo.sampling import candidates, draw, remember, uniform_noise
from selfevo.trie import Ids, as_ids, build_trie, pack

MAX_PREFILL_TOKENS = 4096  # distinct prompt tokens of one prefill pass


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; ``temperature`` 0 is greedy, ``top_k`` 0, ``top_p`` 1 and penalty 1 switch a step off."""

    temperature: float = 0.9
    top_p: float = 0.8
    top_k: int = 50
    repetition_penalty: float = 1.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative: {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]: {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative (0 switches it off): {self.top_k}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be positive: {self.repetition_penalty}")

    def choose(self, logits: Tensor, seen: Tensor, keys: Tensor, steps: Tensor) -> Tensor:
        """Logits (V, R), overwritten, ids seen (R, L), both as :func:`candidates` wants them, sequence keys and step
        numbers (R,) -> next ids (R,). Of likeliest ids that tie, greedy takes the smallest."""
        greedy = self.temperature == 0
        temperature, top_k, top_p = (1.0, 1, 1.0) if greedy else (self.temperature, self.top_k, self.top_p)
        probs, ids = candidates(
            logits, seen, penalty=self.repetition_penalty, temperature=temperature, top_k=top_k, top_p=top_p
        )
        noise = uniform_noise(self.seed, keys, steps)
        return draw(probs, ids, torch.zeros_like(noise) if greedy else noise)


@dataclass
class Reply:
    """One prompt on its way to a reply."""

    index: int
    key: int
    prompt: Ids
    distinct: int = 0  # ids of the prompt
    reply: list[int] = field(default_factory=list)


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.9,
    top_p: float = 0.8,
    top_k: int = 50,
    repetition_penalty: float = 1.2,
    seed: int = 0,
    keys: Sequence[int] | None = None,
    batch_size: int = 32,
    stop_when: Callable[[list[int]], bool] | None = None,
    on_reply: Callable[[int, list[int]], None] | None = None,
    progress: str | None = None,
) -> list[list[int]]:
    """Samples one reply per prompt: new ids only, the stop id not included, in the order of the prompts.

    ``temperature`` 0 is greedy. A reply depends on the seed, its own prompt and its key (by default its index), not on
    the prompts that share its batch. ``stop_when`` is asked after every token and ends a reply, that token included.
    At most ``batch_size`` replies are decoded at a time; ``on_reply`` gets the index and the ids of each as soon as it
    is finished, in any order; ``progress`` names a progress bar. Adapters are used as they
    are, without dropout. Raises ValueError for an empty prompt or one that leaves no room for ``max_new_tokens``.
    """
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed)
    if keys is None:
        keys = range(len(prompts))
    _check(model, prompts, keys, max_new_tokens, batch_size)
    if not prompts:
        return []
    waiting = [Reply(index, key, as_ids(prompt)) for index, (key, prompt) in enumerate(zip(keys, prompts))]
    was_training = model.training
    model.eval()
    try:
        bar = tqdm(total=len(prompts), desc=progress, unit="reply", disable=progress is None)
        with bar, ready_layers(model):
            decoder = _Decoder(
                model, sampling, waiting, max_new_tokens, frozenset(stop_ids), batch_size, stop_when, on_reply
            )
            while decoder.step():
                bar.update(decoder.finished - bar.n)
                bar.set_postfix_str(f"{decoder.produced} tokens", refresh=False)
            bar.update(decoder.finished - bar.n)
    finally:
        model.train(was_training)
    return [sequence.reply for sequence in waiting]


class _Decoder:
    """Slots and the queue of prompts that wait for one."""

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling,
        sequences: list[Reply],
        max_new_tokens: int,
        stop_ids: frozenset[int],
        batch_size: int,
        stop_when: Callable[[list[int]], bool] | None,
        on_reply: Callable[[int, list[int]], None] | None,
    ) -> None:
        self.model, self.sampling = model, sampling
        self.max_new_tokens, self.stop_ids = max_new_tokens, stop_ids
        self.stop_when, self.on_reply = stop_when, on_reply
        slots = min(batch_size, len(sequences))
        longest = max(len(sequence.prompt) for sequence in sequences)
        self.cache = row_cache(model, slots, longest, max_new_tokens)
        self.graphs = step_graphs(model.device)
        self.logits = logits_room(slots, model.lm_head.weight)
        self.seen = torch.zeros(slots, longest + max_new_tokens, dtype=torch.int64, device=model.device)
        self.keys = torch.zeros(slots, dtype=torch.int64, device=model.device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=model.device)  # of what was seen
        self.steps = torch.zeros(slots, dtype=torch.int64, device=model.device)
        self.last = torch.zeros(slots, dtype=torch.int64, device=model.device)
        packs = pack([[sequence.prompt] for sequence in sequences], MAX_PREFILL_TOKENS)
        self.packs = deque([sequences[index] for index in members] for members in packs)
        self.ready: deque[tuple[Reply, Prompt, Tensor]] = deque()  # prefilled: sequence, keys, last hidden state
        self.running: list[Reply] = []
        self.finished = self.produced = 0

    def step(self) -> bool:
        """Decodes one token for every running reply and one for those that enter; False once all are finished."""
        if self.running:
            self._accept(slice(0, len(self.running)), self._decode())
            self._retire()
        while self._enter():
            self._retire()
        return bool(self.running)

    def _decode(self) -> Tensor:
        """Feeds the last tokens: hidden states (R, D)."""
        self.cache.advance(len(self.running))
        if self.graphs is None:
            hidden = self._feed()
        else:
            hidden = self.graphs.run((self.cache.rows, self.cache.span), self._feed)
        return hidden[: len(self.running)]

    def _feed(self) -> Tensor:
        """The part of a step that depends on nothing but its shape and what the buffers hold: (rows, D)."""
        step, last = self.cache.step(), self.last[: self.cache.rows, None]
        hidden = self.model.hidden_states(
            last, step.positions, step.mask, cache=self.cache, key_positions=step.key_positions
        )
        return hidden[:, 0]

    def _accept(self, rows: slice, hidden: Tensor) -> None:
        """Chooses the next token of some rows and appends it to their replies."""
        sequences, lengths = self.running[rows], self.lengths[rows]
        seen = self.seen[rows, : max(sequence.distinct + len(sequence.reply) for sequence in sequences)]
        logits = head_logits(hidden, self.model.lm_head.weight, self.logits)
        tokens = self.sampling.choose(logits, seen, self.keys[rows], self.steps[rows])
        self.last[rows] = tokens
        self.steps[rows] += 1
        remember(self.seen[rows], lengths, tokens)
        self.lengths[rows] += 1
        for sequence, token in zip(sequences, tokens.tolist()):
            sequence.reply.append(token)
        self.produced += len(tokens)

    def _retire(self) -> None:
        """Takes finished replies out; the last row moves into the gap, so active rows stay the first ones."""
        for row in reversed(range(len(self.running))):
            sequence = self.running[row]
            stopped = sequence.reply[-1] in self.stop_ids
            if stopped:
                sequence.reply.pop()
            elif len(sequence.reply) < self.max_new_tokens and not (self.stop_when and self.stop_when(sequence.reply)):
                continue
            self.finished += 1
            if self.on_reply is not None:
                self.on_reply(sequence.index, sequence.reply)
            final = len(self.running) - 1
            if row != final:
                self.cache.move(final, row)
                for state in (self.seen, self.keys, self.lengths, self.steps, self.last):
                    state[row] = state[final]
                self.running[row] = self.running[final]
            self.running.pop()

    def _enter(self) -> bool:
        """Fills free slots with prefilled prompts and gives each its first token; False if nothing entered."""
        first = len(self.running)
        states = []
        while len(self.running) < len(self.keys) and (self.ready or self._prefill()):
            sequence, branch, hidden = self.ready.popleft()
            slot, distinct = len(self.running), torch.from_numpy(np.unique(sequence.prompt))
            sequence.distinct = len(distinct)
            self.cache.enter(slot, branch)
            self.seen[slot] = int(distinct[0])
            self.seen[slot, : len(distinct)] = distinct
            self.keys[slot], self.lengths[slot], self.steps[slot] = sequence.key, len(distinct), 0
            self.running.append(sequence)
            states.append(hidden)
        if states:
            self._accept(slice(first, len(self.running)), torch.stack(states))
        return bool(states)

    def _prefill(self) -> bool:
        """Computes the next pack's distinct prefixes; False if none is left."""
        if not self.packs:
            return False
        members = self.packs.popleft()
        trie = build_trie([sequence.prompt for sequence in members])
        device = self.model.device
        prefill = PrefillCache()
        tokens, positions = trie.tokens.to(device)[None], trie.positions.to(device)[None]
        hidden = self.model.hidden_states(tokens, positions, trie.mask(device), cache=prefill)[0]
        last = hidden[torch.tensor([path[-1] for path in trie.paths], device=device)]
        self.ready += zip(members, self.cache.prompts(prefill, trie), last)
        return True


def _check(
    model: Transformer, prompts: Sequence[Sequence[int]], keys: Sequence[int], max_new_tokens: int, batch_size: int
) -> None:
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) and batch_size ({batch_size}) must be at least 1")
    if len(keys) != len(prompts):
        raise ValueError(f"there are {len(prompts)} prompts but {len(keys)} keys")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} has no tokens")
        if min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
            raise ValueError(f"prompt {index}: token ids should lie in 0..{model.config.vocab_size - 1}")
        if len(prompt) + max_new_tokens > model.config.max_positions:
            raise ValueError(
                f"prompt {index}: {len(prompt)} tokens and {max_new_tokens} new ones do not fit into the model's "
                f"window of {model.config.max_positions}"
            )
